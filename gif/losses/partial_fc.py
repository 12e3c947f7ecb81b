"""Partial FC: a margin softmax over a sample of the identities, whose centres alone move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gif.distributed import gather_rows, mean_over_processes, rank
from gif.errors import InputError
from gif.files import save_tensors
from gif.head import HEAD_FORMAT, Head, TablePart
from gif.losses.health import against_others
from gif.losses.sampling import brought, stratified
from gif.losses.softmax import first_centers
from gif_kernels import AngularMargin, checks, code_contrast_gradients, code_contrast_loss
from gif_kernels.autograd import in_backward_pass, with_row_gradients
from gif_kernels.reduction import reduce_rows


class PartialFC(nn.Module, Head):
    """Margin softmax over the batch's classes and others at random (An et al., CVPR 2022, arXiv 2203.15565).

    Its centres and their momentum are (m, d) each, and a step reads and writes the rows of its sample S alone: its work
    and its memory know the sample and not m. They are no parameters and not in ``state_dict()``, but tables of a
    `Head`, of which checkpoints keep the rows that moved. The rows of S take the step of torch.optim.SGD, with g the
    gradient of the batch's mean loss::

        v <- momentum v + (g + weight_decay w),   w <- w - rate v

    when the backward pass of the loss comes by, once for each forward pass; with the forward pass where the embeddings
    need no gradient. Other rows stay as they are: neither their momentum nor their decay goes on. A row whose step is
    not finite stays too, as after an overflow in float16; where a GradScaler skips the optimizer's step for an overflow
    in the backward pass alone, the centres have taken theirs. In evaluation nothing moves.

    S is drawn anew after each step: each class is as likely as any other, hardly any is drawn twice, and one that is,
    or that the batch has too, counts once. So it has about as many classes as are drawn, and up to a batch more.

    Processes that train together have the same tables, draw alike, share their batches' classes and all take the step
    with the mean of their gradients: that is the one step of the whole batch. Make them start alike by
    `gif.distributed.replicate`, as `gif.training.train` does.

    Args:
        num_classes: m.
        embedding_size: d.
        sample_rate: share of the classes that are drawn in a step, in (0, 1]; 1 takes all.
        samples: how many are drawn, in place of a share; from m on all.
        margin: of the target logit.
        scale: s of the logits.
        centers: directions (m, d) that the centres start from; random where None. All start with the same length.
        momentum: of the step, in [0, 1).
        weight_decay: of the step.
        lr: its rate, until `begin_step` says that of the optimizer, as the training loop does before each step.

    Attributes:
        weight: the centres (m, d) float32, a buffer.
        momentum: v (m, d) float32, a buffer.
        mu: the argument ``momentum``.
        draws: () int64, a buffer: the counter of the random numbers, to which each step adds one. It is part of the
            state, so that a run that continues draws what it would have drawn.
        step_share: what share of an optimizer's step one forward pass is, 1 / k where gradients accumulate over k
            micro-batches. Each is a step of its own sample then, at that share of the rate, and momentum counts them.

    Raises ValueError unless one of ``sample_rate`` and ``samples`` is given, for a number out of its range, or for
    centres of another shape.
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        *,
        sample_rate: float | None = None,
        samples: int | None = None,
        margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
        scale: float = 64.0,
        centers: Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise InputError(f"weight_decay must be >= 0, got {weight_decay}")
        checks.finite("lr", lr)
        self.num_classes = num_classes
        self.samples = _samples(num_classes, sample_rate, samples)
        self.margin = margin
        self.scale = scale
        self.mu = momentum
        self.weight_decay = weight_decay
        self.lr = lr
        self.step_share = 1.0
        self._moved: list[Tensor] = []
        self.register_buffer("weight", first_centers(num_classes, embedding_size, centers), persistent=False)
        self.register_buffer("momentum", torch.zeros(num_classes, embedding_size), persistent=False)
        self.register_buffer("draws", torch.randint(1 << 62, ()))
        self.weight: Tensor
        self.momentum: Tensor
        self.draws: Tensor

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored."""
        checks.floating("embeddings", embeddings, ("B", self.weight.shape[1]), finite=False)
        hint = "this softmax is over other classes (-1 marks a row to ignore)"
        labels = checks.integer("labels", labels, (len(embeddings),), low=-1, high=self.num_classes, hint=hint)
        steps = self.training and torch.is_grad_enabled()
        losses = (self._losses_that_step if steps else self._losses)(embeddings, labels)
        return reduce_rows(losses, labels >= 0, "mean")

    def sample(self, labels: Tensor) -> Tensor:
        """The classes (C,) of a step with ``labels`` (B,), each once and in order; in training, of all processes'."""
        own = brought(labels)
        own = gather_rows(own) if self.training else own
        return torch.cat([own, stratified(self.samples, self.num_classes, self.draws)]).unique()

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row, (B,)."""
        classes = self.sample(labels)
        weight = self.weight.index_select(0, classes)
        return code_contrast_loss(embeddings, weight, labels, candidates=classes, reduction="none", **self._softmax)

    def _losses_that_step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """`_losses`, whose backward pass takes the step of the sample's centres.

        Both gradients are computed here, with the losses.
        """
        classes = self.sample(labels)
        weight = self.weight.index_select(0, classes)
        losses, of_embeddings, of_weight = code_contrast_gradients(
            embeddings, weight, labels, candidates=classes, **self._softmax
        )
        gradient = mean_over_processes(of_weight.div_((labels >= 0).sum().clamp(min=1)))
        step = partial(self._step, classes, gradient, self.lr * self.step_share)
        if embeddings.requires_grad:
            return with_row_gradients(losses, embeddings, of_embeddings, step)
        if not in_backward_pass():
            step()
        return losses

    @property
    def _softmax(self) -> dict[str, Any]:
        return {"margin": self.margin, "scale": self.scale}

    @torch.no_grad()
    def _step(self, classes: Tensor, gradient: Tensor, lr: float) -> None:
        """Move the centres of ``classes`` (C,), each named once, by their ``gradient`` (C, d), which is used up."""
        weight = self.weight.index_select(0, classes)
        velocity = self.momentum.index_select(0, classes)
        velocity.mul_(self.mu).add_(gradient.add_(weight, alpha=self.weight_decay))
        weight.sub_(velocity, alpha=lr)
        finite = weight.sum(1).isfinite()
        if not bool(finite.all()):
            classes, weight, velocity = classes[finite], weight[finite], velocity[finite]
        self.weight.index_copy_(0, classes, weight)
        self.momentum.index_copy_(0, classes, velocity)
        for moved in self._moved:
            moved.index_fill_(0, classes, True)
        self.draws.add_(1)

    def begin_step(self, rate: float, share: float, done: float) -> None:
        """Step at the optimizer's ``rate`` from now on."""
        self.lr = rate

    @contextmanager
    def share_of_a_step(self, share: float) -> Iterator[None]:
        """Within the block one forward pass is this share of an optimizer's step (`step_share`)."""
        self.step_share = share
        try:
            yield
        finally:
            self.step_share = 1.0

    def tables(self) -> dict[str, Tensor | TablePart]:
        """The centres (m, d) under "weight" and their momentum (m, d) under "momentum"."""
        return {"weight": self.weight, "momentum": self.momentum}

    def mark_moves(self, moved: Mapping[str, Tensor]) -> None:
        """Mark the classes that move in ``moved["weight"]`` and ``moved["momentum"]``, (m,) bool each."""
        self._moved = [moved[name] for name in self.tables()]

    def save_tables(self, folder: Path) -> None:
        """Write the centres to centers.safetensors."""
        if rank() == 0:
            save_tensors(folder / "centers.safetensors", {"weight": self.weight}, format=HEAD_FORMAT)

    @torch.no_grad()
    def health(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`gif.losses.health.against_others` of embeddings (B, d), among the centres of the batch's identities."""
        embeddings, labels = embeddings[labels >= 0], labels[labels >= 0].long()
        return against_others(embeddings, labels, self.weight[labels], labels)

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, {self.samples} of them in a step, {self.margin}, scale={self.scale}"


def _samples(num_classes: int, sample_rate: float | None, samples: int | None) -> int:
    """How many classes are drawn in a step."""
    if (sample_rate is None) == (samples is None):
        raise InputError(
            f"wanted one of sample_rate and samples, got sample_rate={sample_rate} and samples={samples}; give a "
            "share of the classes or how many"
        )
    if samples is not None:
        checks.positive("samples", samples)
        if samples != int(samples):
            raise InputError(f"samples must be a whole number, got {samples}")
        return min(int(samples), num_classes)
    assert sample_rate is not None
    if not 0 < sample_rate <= 1:
        raise InputError(f"sample_rate must lie in (0, 1], got {sample_rate}; 1 takes all classes")
    return max(1, int(sample_rate * num_classes))
