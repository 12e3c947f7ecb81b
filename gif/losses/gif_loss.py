"""The loss that replaces a softmax over identities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gif.codes import IdentityCodes
from gif.data.identities import require_same
from gif.distributed import gather_rows, mean_over_processes, shared_seed
from gif.errors import InputError
from gif.head import Head
from gif.losses.health import against_others
from gif.losses.recipes import RECIPES, Recipe, RecipeName
from gif.losses.token_weights import TokenWeights, token_weights
from gif.vectors.store import CodeVectors
from gif_kernels import CodeRegression, checks, code_contrast_loss, code_regression_loss, token_margin_loss
from gif_kernels.autograd import with_row_gradients
from gif_kernels.reduction import Reduction, reduce_rows


class GIFLoss(nn.Module, Head):
    """L = alpha L_C + gamma L_AR + beta L_CC: predict the identity's code, and find its code vector among others.

    Memory and time depend on the codes' length and vocabulary, not on the number of identities. The tables of codes and
    of code vectors are no parameters, are not in ``state_dict()``, and need not be on the embeddings' device: a step
    reads the rows of its own batch, and of their siblings in the code tree. ``state_dict()`` holds the trained
    parameters and the fingerprints of the code table and of the identities' names, where the codes know them; loading
    it into a loss with other codes, or with the codes of others, raises ValueError.

    Recipe "paper" is L_C + L_AR as published. Recipe "live", the default, adds the contrast L_CC, and lets the code
    vectors it reads take a step of gradient descent in training: **the table given as ``vectors`` changes in place**,
    and belongs to the training state (see `tables`). The step is taken once for each forward pass, when the backward
    pass comes by; with the forward pass where the embeddings need no gradient. A forward pass that activation
    checkpointing repeats is still one. A code vector whose step is not finite stays as it is, as after an overflow in
    float16. Nothing else is undone: where a GradScaler skips the optimizer's step for an overflow in the backward pass
    alone, the code vectors have taken theirs, whose gradient is never scaled.

    Args:
        codes: the identities' codes, (m, l) in [0, v), or their file.
        vectors: the identities' code vectors, (m, d), or their file; None where no term reads them.
        embedding_size: d, the width of the embeddings.
        recipe: the terms, their weights, scales and margins, by name or as a `Recipe`.
        projection: "linear" gives each token its own projection P_j (d x d); "none" compares the embedding itself.
        token_weights: lambda, a pattern's name or (l,) weights, which are normalised to sum 1.
        overrides: fields of `Recipe` to set, such as ``scale=32.0`` or ``regression_weight=0.0``.

    Attributes:
        step_share: what share of an optimizer's step one forward pass is, 1 / k where gradients accumulate over k
            micro-batches. Each then moves the code vectors that it reads by that share of ``vector_lr``.
        moved: None, or (m,) bool, in which the rows that move are marked: what a checkpoint need write.
        stayed: how many code vectors could not take their step, summed over the steps: () int64 on the table's device,
            so that counting waits for nothing.

    Raises TypeError for an unknown override, ValueError where codes, vectors and embedding_size do not fit each other,
    or codes and vectors say that they are of other identities.
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else

    def __init__(
        self,
        codes: IdentityCodes | str | Path,
        vectors: CodeVectors | str | Path | None,
        embedding_size: int = 512,
        *,
        recipe: RecipeName | Recipe = "live",
        projection: Literal["linear", "none"] = "linear",
        token_weights: TokenWeights | Tensor = "uniform",
        **overrides: Any,
    ) -> None:
        super().__init__()
        codes, vectors = _codes(codes), _code_vectors(vectors)
        if isinstance(recipe, str):
            checks.choice("recipe", recipe, tuple(RECIPES))
            recipe = RECIPES[recipe]
        known = [entry.name for entry in fields(Recipe)]
        if unknown := sorted(set(overrides) - set(known)):
            raise TypeError(f"{', '.join(unknown)}: no option of GIFLoss and no field of a recipe, which are {known}")
        self.recipe = replace(recipe, **overrides)
        if vectors is None and self.recipe.needs_vectors:
            raise InputError(
                "vectors are needed for the regression and contrast terms; give them, or set regression_weight=0 and "
                "contrast_weight=0"
            )
        if vectors is not None and len(vectors) != len(codes):
            raise InputError(
                f"codes are for {len(codes)} identities and vectors for {len(vectors)}; tokenize these vectors"
            )
        if vectors is not None:
            require_same("the codes", codes.identities, "the code vectors", vectors.identities)
        if vectors is not None and vectors.width != embedding_size:
            raise InputError(f"vectors have width {vectors.width}, embedding_size is {embedding_size}; make them agree")
        checks.choice("projection", projection, ("linear", "none"))
        self.codes = codes
        self.vectors = vectors
        self.embedding_size = embedding_size
        self.step_share = 1.0
        self.moved: Tensor | None = None
        self.stayed = torch.zeros((), dtype=torch.int64, device=None if vectors is None else vectors.table.device)
        length, vocab = codes.length, codes.vocab_size
        self.centers = nn.Parameter(torch.randn(length, vocab, embedding_size) / embedding_size**0.5)
        self.projections = None
        if projection == "linear":
            self.projections = nn.Parameter(torch.empty(length, embedding_size, embedding_size))
            for matrix in self.projections:
                nn.init.orthogonal_(matrix)
        self.register_buffer("token_weights", _weights(token_weights, length), persistent=False)
        self.token_weights: Tensor

    def forward(self, embeddings: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; a label of -1 is ignored.

        With reduction "none" it is the loss of each row, (B,), to be weighted; the code vectors step by the mean's.
        """
        checks.floating("embeddings", embeddings, ("B", self.embedding_size), finite=False)
        labels = self._checked(labels, embeddings)
        recipe = self.recipe
        loss = embeddings.new_zeros((), dtype=torch.float32)
        if recipe.code_weight > 0:
            regression = None
            if recipe.regression_weight > 0:
                regression = CodeRegression(*self._targets(labels), recipe.regression_weight / recipe.code_weight)
            loss = loss + recipe.code_weight * self.code_loss(embeddings, labels, reduction, regression)
        elif recipe.regression_weight > 0:
            loss = loss + recipe.regression_weight * self.regression_loss(embeddings, labels, reduction)
        if recipe.contrast_weight > 0:
            loss = loss + recipe.contrast_weight * self.contrast_loss(embeddings, labels, reduction)
        return loss

    def code_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reduction: Reduction = "mean",
        regression: CodeRegression | None = None,
    ) -> Tensor:
        """L_C (): cross entropy of the tokens, unweighted; and the pull of ``regression``, in one pass."""
        labels = self._checked(labels, embeddings)
        return token_margin_loss(
            embeddings,
            self.centers,
            self.codes.lookup(labels),
            projections=self.projections,
            token_weights=self.token_weights,
            regression=regression,
            margin=self.recipe.margin,
            scale=self.recipe.scale,
            reduction=reduction,
        )

    def regression_loss(self, embeddings: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """L_AR (): squared distance of the cosine to the own code vector from 1, halved, unweighted."""
        targets, rows = self._targets(self._checked(labels, embeddings))
        return code_regression_loss(embeddings, targets, rows=rows, reduction=reduction)

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The code vectors and the row of each label in them: the table itself, or, if it moves, a copy of its rows."""
        assert self.vectors is not None  # checked at construction
        if self.vectors.table.device == labels.device and not self.recipe.moves_vectors:
            return self.vectors.table, labels
        rows = torch.arange(len(labels), device=labels.device)
        return self.vectors.lookup(labels.clamp(min=0)), torch.where(labels >= 0, rows, -1)

    def contrast_loss(self, embeddings: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """L_CC (): cross entropy of the own code vector among the batch's and their siblings', unweighted.

        In training with gradients, those code vectors take their step h <- normalise(h - vector_lr dL_CC/dh) when the
        backward pass comes by, or at once where the embeddings need no gradient.

        Processes that train together (`torch.distributed`) share their candidates, and all take the same step with the
        mean of their gradients: that is the one step of the whole batch, and each process's table stays the same.
        """
        assert self.vectors is not None  # checked at construction
        labels = self._checked(labels, embeddings)
        candidates = self._candidates(labels)
        if len(candidates) == 0:
            losses = embeddings.sum(1, dtype=torch.float32)  # zero, and differentiable
        else:
            vectors = self.vectors.lookup(candidates)
            # Steps are smaller than what a bfloat16 gradient tells apart.
            vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            moves = self.recipe.moves_vectors and self.training and torch.is_grad_enabled()
            contrast = self._contrast_that_steps if moves else self._contrast
            losses = contrast(embeddings, labels, vectors, candidates)
        return reduce_rows(losses, labels >= 0, reduction)

    def _candidates(self, labels: Tensor) -> Tensor:
        """The identities (C,) that a batch is contrasted with: its own, then their siblings; of all processes' batches.

        Outside of training they are this process's alone. There is none for an empty batch.
        """
        largest = torch.cat([labels.new_zeros(1), labels]).max()
        own = torch.where(labels >= 0, labels, largest)  # an ignored row brings nobody new
        candidates = torch.cat([own, self.codes.siblings(own, self.recipe.siblings).flatten()])
        return gather_rows(candidates) if self.training else candidates

    def _contrast(self, embeddings: Tensor, labels: Tensor, vectors: Tensor, candidates: Tensor) -> Tensor:
        """L_CC of each row, (B,), against the code vectors (C, d) of the candidates (C,)."""
        return code_contrast_loss(
            embeddings,
            vectors,
            labels,
            candidates=candidates,
            margin=self.recipe.contrast_margin,
            scale=self.recipe.contrast_scale,
            reduction="none",
        )

    def _contrast_that_steps(self, embeddings: Tensor, labels: Tensor, vectors: Tensor, candidates: Tensor) -> Tensor:
        """`_contrast`, after which the code vectors of the candidates take their step.

        Both gradients are computed here, with the losses: the vectors' gives the step, which the backward pass takes
        when it comes by and hands the embeddings theirs; where they need none the step is taken here.
        """
        point = embeddings.detach().requires_grad_()
        with _kept_graph():
            losses = self._contrast(point, labels, vectors.requires_grad_(), candidates)
        of_embeddings, of_vectors = torch.autograd.grad(losses.sum(), (point, vectors))
        gradient = mean_over_processes(of_vectors / (labels >= 0).sum().clamp(min=1))
        step = partial(self._move, candidates, gradient, self.recipe.vector_lr * self.step_share, self._seed(vectors))
        losses = losses.detach()
        if embeddings.requires_grad:
            return with_row_gradients(losses, embeddings, of_embeddings, step)
        if not _repeated():
            step()
        return losses

    def _seed(self, vectors: Tensor) -> int:
        """Of the rounding of a step that was computed from ``vectors``, the same on every process."""
        rounds = self.vectors is not None and self.vectors.table.dtype.itemsize < vectors.dtype.itemsize
        return shared_seed(vectors.device) if rounds else 0

    def _move(self, candidates: Tensor, gradient: Tensor, lr: float, seed: int) -> None:
        assert self.vectors is not None  # checked at construction
        self.stayed += self.vectors.move_(candidates, gradient, lr, seed=seed)
        if self.moved is not None:
            self.moved[candidates.to(self.moved.device)] = True

    def _checked(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """Check the labels, one for each row of the embeddings, and return them as (B,) int64."""
        hint = "these codes were made for other identities (-1 marks a row to ignore)"
        shape = (len(embeddings),)
        return checks.integer("labels", labels, shape, low=-1, high=len(self.codes), hint=hint, asserted=False)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """The likeliest token at each place of the code, (B, l) int64, for embeddings (B, d)."""
        features = nn.functional.normalize(embeddings.to(self.centers.dtype), dim=1)
        centers = nn.functional.normalize(self.centers, dim=2)
        if self.projections is None:
            return torch.einsum("bd,lvd->blv", features, centers).argmax(2)
        return torch.einsum("bd,lid,lvi->blv", features, self.projections, centers).argmax(2)

    def tables(self) -> dict[str, Tensor]:
        """What training changes beside the parameters, to be saved with a checkpoint and restored in place.

        The code vectors (m, d) under "vectors" where the recipe moves them, else nothing.
        """
        return {"vectors": self.vectors.table} if self.vectors is not None and self.recipe.moves_vectors else {}

    def mark_moves(self, moved: Mapping[str, Tensor]) -> None:
        """Mark the code vectors that move in ``moved["vectors"]``, (m,) bool."""
        self.moved = moved["vectors"]

    @contextmanager
    def share_of_a_step(self, share: float) -> Iterator[None]:
        """Within the block one forward pass is this share of an optimizer's step (`step_share`)."""
        self.step_share = share
        try:
            yield
        finally:
            self.step_share = 1.0

    def check_processes(self, processes: int) -> None:
        """Raise InputError where each of several processes would move the rows of one file."""
        if processes > 1 and self.tables() and self.vectors and self.vectors.file:
            raise InputError(
                f"each of {processes} processes would move the rows of {self.vectors.file}; load the code vectors "
                "without writable=True: checkpoints keep what moved"
            )

    def save_tables(self, folder: Path) -> None:
        """Write the code vectors to vectors.safetensors where training moved them."""
        if self.vectors is not None and self.recipe.moves_vectors:
            self.vectors.save(folder / "vectors.safetensors")

    @torch.no_grad()
    def health(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named measures () of embeddings (B, d) with identities ``labels`` (B,); a label of -1 is ignored.

        - ``token accuracy/1`` ... ``/l``: share of the batch whose likeliest token is right at each place of the code.
        - ``code accuracy``: share whose whole code is right.
        - ``code vectors stayed``: how many could not take their step so far, since it was not finite.
        - those of `gif.losses.health.against_others`, among the code vectors of the batch and of their siblings.
        """
        embeddings, labels = embeddings[labels >= 0], labels[labels >= 0].long()
        hits = self.predict(embeddings) == self.codes.lookup(labels)
        measures = {f"token accuracy/{place}": share for place, share in enumerate(hits.float().mean(0), 1)}
        measures["code accuracy"] = hits.all(1).float().mean()
        if self.vectors is None:
            return measures
        candidates = torch.cat([labels, self.codes.siblings(labels, self.recipe.siblings).flatten()])
        if self.recipe.moves_vectors:
            measures["code vectors stayed"] = self.stayed.to(embeddings.device)
        return measures | against_others(embeddings, labels, self.vectors.lookup(candidates), candidates)

    def get_extra_state(self) -> Tensor:
        """Fingerprints of the code table and, where known, of the names, as bytes: part of ``state_dict()``."""
        who = self.codes.identities
        digits = self.codes.fingerprint + ("" if who is None else who.names.fingerprint)
        return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the state was made with this code table, and these names where both know them."""
        given, own = (bytes(each.tolist()).hex() for each in (state, self.get_extra_state()))
        size = len(self.codes.fingerprint)
        names = (given[size:], own[size:])
        other_names = all(names) and names[0] != names[1]
        if given[:size] == own[:size] and not other_names:
            return
        what = "the codes of identities of other names" if other_names else "another code table"
        there, here = names if other_names else (given, own)
        raise InputError(
            f"this state was trained with {what} (fingerprint {there[:12]}..., the codes here have {here[:12]}...); "
            "load the codes file that was used in training"
        )

    def extra_repr(self) -> str:
        return f"{self.codes}, {self.recipe}"


def _kept_graph() -> saved_tensors_hooks:
    """Around a graph that is differentiated at once: activation checkpointing need not repeat a forward pass for it."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _repeated() -> bool:
    """Whether this forward pass is one that activation checkpointing repeats: it runs inside of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _codes(codes: IdentityCodes | str | Path) -> IdentityCodes:
    if isinstance(codes, str | Path):
        return IdentityCodes.load(codes)
    if not isinstance(codes, IdentityCodes):
        raise TypeError(f"codes must be IdentityCodes or the path of their file, got {type(codes).__name__}")
    return codes


def _code_vectors(vectors: CodeVectors | str | Path | None) -> CodeVectors | None:
    if isinstance(vectors, str | Path):
        return CodeVectors.load(vectors)
    if not isinstance(vectors, CodeVectors | None):
        raise TypeError(f"vectors must be CodeVectors or the path of their file, got {type(vectors).__name__}")
    return vectors


def _weights(weights: TokenWeights | Tensor, length: int) -> Tensor:
    if isinstance(weights, str):
        return token_weights(weights, length)
    if weights.shape != (length,) or bool((weights < 0).any()) or float(weights.sum()) <= 0:
        raise InputError(f"token_weights must be ({length},) weights >= 0 with a sum > 0, got {weights}")
    return (weights / weights.sum()).detach().float()
