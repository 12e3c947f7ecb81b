"""Kernels for training recognition models with millions of identities: tensors in, tensors out."""

from gif_kernels.code_contrast.op import code_contrast_loss
from gif_kernels.code_regression.op import CodeRegression, code_regression_loss
from gif_kernels.gaussian_potential.op import gaussian_potential
from gif_kernels.gradcheck import gradcheck
from gif_kernels.margins import AngularMargin
from gif_kernels.max_cosine.op import max_cosine
from gif_kernels.nearest_centroid.op import nearest_centroid
from gif_kernels.token_margin.op import token_margin_loss
from gif_kernels.uniformity_step.op import uniformity_step_
from gif_kernels.vector_step.op import vector_step_

__all__ = [
    "AngularMargin",
    "CodeRegression",
    "code_contrast_loss",
    "code_regression_loss",
    "gaussian_potential",
    "gradcheck",
    "max_cosine",
    "nearest_centroid",
    "token_margin_loss",
    "uniformity_step_",
    "vector_step_",
]
