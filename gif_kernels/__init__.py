"""Kernels for training recognition models with millions of identities: tensors in, tensors out.

The ops are imported from here. Packages that build on them may also use what `__all__` names in these modules:

    errors                      InputError, for what the person who called can mend
    checks                      checks of arguments, whose messages say what to do
    sphere                      rows on the unit sphere
    reduction                   a loss a row to a mean or a sum
    precision                   which dtype, and products in it
    rounding                    stochastic rounding
    runs                        which of several numbers are equal
    autograd                    a loss whose gradient is already known
    dispatch                    which implementation of an op runs, and why
    gaussian_potential.blocked  the size of its tiles, for planning memory and time
    device.tuning               tile sizes of the Triton kernels, for measuring them

Everything else is this package's own and may change.
"""

from gif_kernels.code_contrast.op import code_contrast_gradients, code_contrast_loss
from gif_kernels.code_regression.op import CodeRegression, code_regression_loss
from gif_kernels.gaussian_potential.op import gaussian_potential
from gif_kernels.gradcheck import gradcheck
from gif_kernels.margins import AngularMargin
from gif_kernels.max_cosine.op import max_cosine
from gif_kernels.nearest_centroid.op import nearest_centroid
from gif_kernels.token_margin.op import token_margin_loss
from gif_kernels.uniformity_step.op import uniformity_step_
from gif_kernels.vector_step.op import vector_step_

__version__ = "0.1.0"
"""Of both packages, which are released together."""

__all__ = [
    "AngularMargin",
    "CodeRegression",
    "__version__",
    "code_contrast_gradients",
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
