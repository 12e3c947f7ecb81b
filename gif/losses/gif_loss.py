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

from gif.codes import IdentityCodes
from gif.data.identities import require_same
from gif.devices import to_device
from gif.distributed import gather_part, mean_over_processes, rank
from gif.errors import InputError
from gif.head import Head, Placement, TablePart
from gif.losses.graph import TableStep, then_count, then_step
from gif.losses.health import against_others
from gif.losses.prepared import PreparedLabels
from gif.losses.recipes import RECIPES, Recipe, RecipeName
from gif.losses.sampling import brought, stratified
from gif.losses.token_weights import TokenWeights, token_weights
from gif.resume import WORKING
from gif.vectors.divided import DividedCodeVectors
from gif.vectors.placement import place_code_vectors
from gif.vectors.rows import Rows, RowsInPlace
from gif.vectors.store import CodeVectors
from gif_kernels import (
    CodeRegression,
    checks,
    code_contrast_gradients,
    code_contrast_loss,
    code_regression_loss,
    token_margin_loss,
)
from gif_kernels.autograd import in_backward_pass, with_row_gradients
from gif_kernels.reduction import Reduction, reduce_rows
from gif_kernels.rounding import SIGNIFICAND_BITS

UNSEEN = (0, -1)
"""Of a counter on a device, and its version, when the host has not read it."""


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

    Where codes and vectors are on the embeddings' device, `torch.compile` makes one graph of a forward pass, and one of
    a backward pass that takes the step each time that it runs; a CUDA graph captures both.

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
        schedule, faded: () float32, buffers: the share of ``vector_lr`` at which they move now, and what is left of the
            weights that fade; 1 where nobody says another. `begin_step` sets them, which `gif.training.train` calls: a
            loop of one's own calls it before each step.
        moved: None, or (m,) bool, in which the rows that move are marked: what a checkpoint need write.
        draws: None, or () int64, a buffer: the seed of a step's random numbers, which are negatives and the rounding of
            code vectors that move. Each backward pass adds one. It is part of the state, so that a run that continues
            draws what it would have drawn; a state without it leaves it as it is. Like the parameters it must be the
            same on each process, as `gif.distributed.replicate` and DistributedDataParallel make it.
        stayed: how many code vectors could not take their step, summed over the steps: () int64 where they move, added
            to in place, so that counting waits for nothing and a graph counts too.

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
        self.recipe = replace(recipe, **overrides).fitted(len(codes))
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
        self.register_buffer("schedule", torch.ones(()), persistent=False)
        self.schedule: Tensor
        self.register_buffer("faded", torch.ones(()), persistent=False)
        self.faded: Tensor
        self.register_buffer("draws", torch.randint(1 << 62, ()) if self._draws_at_random() else None)
        self.draws: Tensor | None
        self._draw_seen: tuple[int, int] | None = UNSEEN  # draws as the host saw it, and the tensor's version then

    def forward(self, embeddings: Tensor, labels: Tensor | PreparedLabels, *, reduction: Reduction = "mean") -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; a label of -1 is ignored.

        With reduction "none" it is the loss of each row, (B,), to be weighted; the code vectors step by the mean's.
        Labels that were prepared (`prepare`) are those of these very embeddings, and are used once.
        """
        checks.floating("embeddings", embeddings, ("B", self.embedding_size), finite=False)
        found = self._prepared(labels, embeddings, **self._asks)
        recipe = self.recipe
        loss = embeddings.new_zeros((), dtype=torch.float32)
        if recipe.code_weight > 0:
            regression = None
            if recipe.regression_weight > 0:
                regression = CodeRegression(*self._targets(found), recipe.regression_weight / recipe.code_weight)
            loss = loss + recipe.code_weight * self._code_loss(embeddings, found, reduction, regression)
        elif recipe.regression_weight > 0:
            loss = loss + recipe.regression_weight * self._regression_loss(embeddings, found, reduction)
        if recipe.fades > 0:
            loss = loss * self.faded
        if recipe.contrast_weight > 0:
            loss = loss + recipe.contrast_weight * self._contrast_loss(embeddings, found, reduction)
        found.release()
        return loss

    def prepare(self, labels: Tensor, device: torch.device, ahead: int = 0) -> PreparedLabels:
        """What the loss of a batch with ``labels`` (B,) needs of the tables, on its way to ``device``.

        Known from the labels alone, so it may be asked for while a step runs: rows on the host or in a file are read
        meanwhile, and labels on the CPU keep the host from waiting. ``ahead``: how many forward passes come before this
        one, from now on; the negatives are drawn for it. Of several processes each prepares the same passes.
        """
        return self._prepare(self._checked(labels, "B"), device, ahead, **self._asks)

    @property
    def _asks(self) -> dict[str, bool]:
        """What the recipe asks for of the code vectors."""
        return {"pulls": self.recipe.regression_weight > 0, "contrasts": self.recipe.contrast_weight > 0}

    def _prepare(
        self, labels: Tensor, device: torch.device, ahead: int = 0, *, pulls: bool, contrasts: bool
    ) -> PreparedLabels:
        """``contrasts``: candidates are asked for; ``pulls``, without: the own identities alone, or the whole table."""
        if self.vectors is None or not (contrasts or (pulls and not self._reads_whole_table(device))):
            return PreparedLabels(self.codes, labels, device)
        identities, begin = self.candidates(labels, ahead) if contrasts else self._shared(brought(labels))
        rows = self.vectors.rows(identities, device)
        return PreparedLabels(self.codes, labels, device, to_device(identities, device), rows, begin)

    def code_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reduction: Reduction = "mean",
        regression: CodeRegression | None = None,
    ) -> Tensor:
        """L_C (): cross entropy of the tokens, unweighted; and the pull of ``regression``, in one pass."""
        found = self._prepared(labels, embeddings, pulls=False, contrasts=False)
        return self._code_loss(embeddings, found, reduction, regression)

    def _code_loss(
        self, embeddings: Tensor, found: PreparedLabels, reduction: Reduction, regression: CodeRegression | None
    ) -> Tensor:
        return token_margin_loss(
            embeddings,
            self.centers,
            found.tokens,
            projections=self.projections,
            token_weights=self.token_weights,
            regression=regression,
            margin=self.recipe.margin,
            scale=self.recipe.scale,
            reduction=reduction,
        )

    def regression_loss(self, embeddings: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """L_AR (): squared distance of the cosine to the own code vector from 1, halved, unweighted."""
        found = self._prepared(labels, embeddings, pulls=True, contrasts=False)
        return self._regression_loss(embeddings, found, reduction)

    def _regression_loss(self, embeddings: Tensor, found: PreparedLabels, reduction: Reduction) -> Tensor:
        targets, rows = self._targets(found)
        return code_regression_loss(embeddings, targets, rows=rows, reduction=reduction)

    def _targets(self, found: PreparedLabels) -> tuple[Tensor, Tensor]:
        """Code vectors and the row of each label in them: the batch's own, or the whole table where none are read."""
        labels = found.labels
        if not found.has_rows:
            assert self.vectors is not None  # checked at construction
            return self.vectors.table, labels
        rows = torch.arange(len(labels), device=labels.device)
        return found.own_vectors, torch.where(labels >= 0, rows, -1)

    def _reads_whole_table(self, device: torch.device) -> bool:
        """Whether the pull alone may read the whole table where it is: all rows, on ``device``, which stay."""
        vectors = self.vectors
        assert vectors is not None  # checked at construction
        whole = vectors.table.device == device and len(vectors.table) == len(vectors)
        return whole and not self.recipe.moves_vectors

    def contrast_loss(self, embeddings: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """L_CC (): cross entropy of the own code vector among the batch's and their siblings', unweighted.

        In training with gradients, those code vectors take their step h <- h - vector_lr schedule dL_CC/dh when the
        backward pass comes by, or at once where the embeddings need no gradient. Its direction counts, and as a step is
        at a right angle to h, its length grows and the next step turns it by less (`gif_kernels.vector_step_`).

        Processes that train together (`torch.distributed`) share their candidates, and all take the same step with the
        mean of their gradients: that is the one step of the whole batch, and each process's table stays the same.
        """
        found = self._prepared(labels, embeddings, pulls=False, contrasts=True)
        return self._contrast_loss(embeddings, found, reduction)

    def _contrast_loss(self, embeddings: Tensor, found: PreparedLabels, reduction: Reduction) -> Tensor:
        labels = found.labels
        if len(found.candidates) == 0:
            losses = embeddings.sum(1, dtype=torch.float32)  # zero, and differentiable
        else:
            moves = self.recipe.moves_vectors and self.training and torch.is_grad_enabled()
            contrast = self._contrast_that_steps if moves else self._contrast
            losses = contrast(embeddings, found)
            if self.training and not moves:
                losses = self._then_draw_others(losses)
        return reduce_rows(losses, labels >= 0, reduction)

    def candidates(self, labels: Tensor, ahead: int = 0) -> tuple[Tensor, int]:
        """The identities (C,) that a batch is contrasted with, and where among them those of its ``labels`` (B,) begin.

        Its own, then their siblings; of all processes' batches in the order of their ranks, but outside of training of
        this process's alone, unless each has a part of the code vectors; then the recipe's negatives, the same for all.
        There is none for an empty batch.
        """
        own = brought(labels)
        candidates = torch.cat([own, self.codes.siblings(own, self.recipe.siblings).flatten()])
        candidates, begin = gather_part(candidates) if self.training else self._shared(candidates)
        if self.recipe.negatives and len(candidates):
            candidates = torch.cat([candidates, self._negatives(candidates.device, ahead)])
        return candidates, begin

    def _shared(self, identities: Tensor) -> tuple[Tensor, int]:
        """What code vectors are asked for, and where the own begin: all processes' where each has a part of them."""
        return gather_part(identities) if isinstance(self.vectors, DividedCodeVectors) else (identities, 0)

    def _negatives(self, device: torch.device, ahead: int) -> Tensor:
        """Identities (min(negatives, m),) of this step, drawn by `stratified`."""
        assert self.draws is not None  # there are negatives
        draw = self.draws if self.draws.device == device else self._draw_on_host()
        return stratified(self.recipe.negatives, len(self.codes), draw + ahead)

    def _draws_at_random(self) -> bool:
        """Whether a training step draws random numbers: negatives, or the rounding of code vectors that move."""
        rounds = self.vectors is not None and self.vectors.table.dtype in SIGNIFICAND_BITS
        return self.recipe.draws_negatives or (rounds and self.recipe.moves_vectors)

    def _then_draw_others(self, losses: Tensor) -> Tensor:
        """``losses`` (B,), after whose backward pass others are drawn; a checkpoint repeats the forward one before."""
        if self.draws is None or not losses.requires_grad:
            return losses
        if torch.compiler.is_compiling():
            self._graph_counts()
            return then_count(losses, self.draws)
        assert losses.grad_fn is not None  # it is a function of the embeddings
        losses.grad_fn.register_hook(lambda *_: self._draw_others())
        return losses

    def _draw_others(self) -> None:
        """From now on: other negatives, and other rounding."""
        if self.draws is None:
            return
        self.draws.add_(1)
        if self.draws.is_cuda and torch.cuda.is_current_stream_capturing():
            self._draw_seen = None
        elif self._draw_seen is not None:
            number, version = self._draw_seen
            self._draw_seen = (number + 1, self.draws._version) if version == self.draws._version - 1 else UNSEEN

    def _graph_counts(self) -> None:
        """Forget what the host knows of ``draws``, if anything: a compiled graph counts unseen."""
        if self._draw_seen not in (None, UNSEEN):
            self._draw_seen = None

    def _draw_on_host(self) -> Tensor:
        """``draws`` on the CPU: read once, and counted from then on, so that the host waits once.

        Where a graph counts, whose replays no host sees, it is read each time.
        """
        assert self.draws is not None  # there are negatives
        if self._draw_seen is None:
            return self.draws.cpu()
        if self._draw_seen[1] != self.draws._version:
            self._draw_seen = (int(self.draws), self.draws._version)
        return torch.tensor(self._draw_seen[0])

    def _contrast(self, embeddings: Tensor, found: PreparedLabels) -> Tensor:
        """L_CC of each row, (B,), against the code vectors (C, d) of the candidates (C,)."""
        return code_contrast_loss(
            embeddings, found.vectors, found.labels, candidates=found.candidates, reduction="none", **self._of_contrast
        )

    @property
    def _of_contrast(self) -> dict[str, Any]:
        return {"margin": self.recipe.contrast_margin, "scale": self.recipe.contrast_scale}

    def _contrast_that_steps(self, embeddings: Tensor, found: PreparedLabels) -> Tensor:
        """`_contrast`, after which the code vectors of the candidates take their step.

        Both gradients are computed here, with the losses: the vectors' gives the step, which the backward pass takes
        when it comes by and hands the embeddings theirs; where they need none the step is taken here.
        """
        losses, of_embeddings, of_vectors = code_contrast_gradients(
            embeddings, found.vectors, found.labels, candidates=found.candidates, **self._of_contrast
        )
        share = self.schedule / (found.labels >= 0).sum().clamp(min=1)
        gradient = mean_over_processes(of_vectors.mul_(share))
        rows, lr = found.rows, self.recipe.vector_lr * self.step_share
        if checks.is_traced(embeddings) and isinstance(rows, RowsInPlace):
            step = TableStep(rows.table, rows.identities, gradient, lr, self.stayed, self.draws, self.moved)
            self._graph_counts()
            if embeddings.requires_grad:
                return then_step(losses, embeddings, of_embeddings, step)
            step.take()
        elif embeddings.requires_grad:
            return with_row_gradients(losses, embeddings, of_embeddings, partial(self._move, rows, gradient, lr))
        elif not in_backward_pass():
            self._move(rows, gradient, lr)
        return losses

    def _move(self, rows: Rows, gradient: Tensor, lr: float) -> None:
        stayed = rows.move_(gradient, lr, 0 if self.draws is None else self.draws)
        if self.stayed.device != stayed.device:  # where rows are moved that lie elsewhere
            self.stayed = self.stayed.to(stayed.device)
        self.stayed.add_(stayed)
        self._draw_others()
        if self.moved is not None:
            rows.mark(self.moved)

    def _prepared(self, labels: Tensor | PreparedLabels, embeddings: Tensor, **asks: bool) -> PreparedLabels:
        if not isinstance(labels, PreparedLabels):
            return self._prepare(self._checked(labels, len(embeddings)), embeddings.device, **asks)
        if len(labels.labels) != len(embeddings):
            raise InputError(f"{len(labels.labels)} labels were prepared, for {len(embeddings)} embeddings")
        return labels

    def _checked(self, labels: Tensor, count: int | str) -> Tensor:
        """So many labels, (B,) int64."""
        hint = "these codes were made for other identities (-1 marks a row to ignore)"
        return checks.integer("labels", labels, (count,), low=-1, high=len(self.codes), hint=hint, asserted=False)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """The likeliest token at each place of the code, (B, l) int64, for embeddings (B, d)."""
        features = nn.functional.normalize(embeddings.to(self.centers.dtype), dim=1)
        centers = nn.functional.normalize(self.centers, dim=2)
        if self.projections is None:
            return torch.einsum("bd,lvd->blv", features, centers).argmax(2)
        return torch.einsum("bd,lid,lvi->blv", features, self.projections, centers).argmax(2)

    def settle(self) -> None:
        """Return when the table holds all code vectors that have moved."""
        if self.vectors is not None:
            self.vectors.settle()

    def tables(self) -> dict[str, Tensor | TablePart]:
        """What training changes beside the parameters, to be saved with a checkpoint and restored in place.

        The code vectors (m, d) under "vectors" where the recipe moves them, else nothing.
        """
        if self.vectors is None or not self.recipe.moves_vectors:
            return {}
        if isinstance(self.vectors, DividedCodeVectors):
            return {"vectors": TablePart(self.vectors.table, self.vectors.begin, len(self.vectors))}
        return {"vectors": self.vectors.table}

    def mark_moves(self, moved: Mapping[str, Tensor]) -> None:
        """Mark the code vectors that move in ``moved["vectors"]``, (m,) bool."""
        self.moved = moved["vectors"]

    def begin_step(self, rate: float, share: float, done: float) -> None:
        """From now on code vectors move at this ``share`` of ``vector_lr``, and what fades counts 1 - done / fades."""
        self.schedule.fill_(share)
        if self.recipe.fades:
            self.faded.fill_(max(0.0, 1 - done / self.recipe.fades))

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
        vectors = self.vectors
        if processes > 1 and self.tables() and vectors and vectors.file and not isinstance(vectors, DividedCodeVectors):
            raise InputError(
                f"each of {processes} processes would move the rows of {vectors.file}; load the code vectors "
                "without writable=True: checkpoints keep what moved"
            )

    def place_tables(self, device: torch.device, placement: Placement, folder: Path, *, goes_on: bool) -> str:
        """Place the code vectors (`gif.vectors.placement`), and the codes on a device that has these."""
        if self.vectors is None or not self.recipe.needs_vectors:
            return ""
        self.vectors, place = place_code_vectors(
            self.vectors, device, placement, folder / WORKING, moves=self.recipe.moves_vectors, goes_on=goes_on
        )
        self.stayed = self.stayed.to(self.vectors.table.device)
        if self.vectors.table.device == device:
            self.codes = self.codes.to(device)
        return f"code vectors: {place}"

    def save_tables(self, folder: Path) -> None:
        """Write the code vectors to vectors.safetensors where training moved them."""
        if self.vectors is None or not self.recipe.moves_vectors:
            return
        if rank() == 0 or isinstance(self.vectors, DividedCodeVectors):
            self.vectors.save(folder / "vectors.safetensors")
        if rank() == 0:
            (folder / WORKING).unlink(missing_ok=True)

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
        shared, begin = self._shared(candidates)
        vectors = self.vectors.lookup(shared)[begin : begin + len(candidates)]
        return measures | against_others(embeddings, labels, vectors, candidates)

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As of any module, but for `draws`: a state may have it or not.

        A head that draws keeps its own count where the state has none; one that does not draw passes over it.
        """
        if self.draws is None:
            state_dict.pop(f"{prefix}draws", None)
        else:
            state_dict.setdefault(f"{prefix}draws", self.draws)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.codes}, {self.recipe}"


def _codes(codes: IdentityCodes | str | Path) -> IdentityCodes:
    if isinstance(codes, str | Path):
        return IdentityCodes.load(codes, mmap=True)
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
