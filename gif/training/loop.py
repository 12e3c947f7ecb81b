"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler, autocast
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gif.data.images import IdentityDataset, normalize_pixels
from gif.data.shared_memory import check_workers
from gif.data.workers import batches_of, leave_signals_to_the_command
from gif.devices import resolve_device, to_device
from gif.distributed import (
    broadcast_buffers,
    least_of_processes,
    mean_over_processes,
    rank,
    replicate,
    world_size,
)
from gif.errors import DivergedError, InputError, Interrupted
from gif.head import Head, as_head
from gif.ownership import hold
from gif.progress import say_once, say_resumed
from gif.resume import LARGEST_SHARE
from gif.training.augmentation import RandomAffine
from gif.training.average import AverageBackbone
from gif.training.checkpoint import Checkpoints, TrainingState, restore_random
from gif.training.config import AUTOCAST, TrainingConfig
from gif.training.early_stopping import is_stale
from gif.training.freezing import freeze
from gif.training.increments import TableIncrements
from gif.training.loggers import Logger
from gif.training.monitor import monitor
from gif.training.order import EpochOrder, Groups, begin_epoch
from gif.training.statistics import RunningStatistics
from gif.training.stop import StopRequest

Validate = Callable[[nn.Module], Mapping[str, float]]
"""Judges a backbone: the names of metrics and their values."""
_Item = TypeVar("_Item")
_Ready = TypeVar("_Ready")
REPORT_EVERY = 10  # steps between looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class TrainingLog:
    """The loss of every step, (steps,) float32; images a second, NaN where a run had nothing left to do; validations.

    ``validations`` are named scores by the number of steps they came after. ``processor_seconds`` is what the whole run
    takes of this process's processors: measured, and of steps before an interruption as much as of those after it.
    ``average`` is the averaged backbone, where the run averages: what was judged, and is to be kept.
    """

    losses: Tensor
    images_per_second: float
    validations: dict[int, dict[str, float]] = field(default_factory=dict)
    processor_seconds: float = math.nan
    average: nn.Module | None = None


def train(
    backbone: nn.Module,
    head: nn.Module,
    dataset: IdentityDataset,
    config: TrainingConfig,
    *,
    augment: Callable[[Tensor], Tensor] = RandomAffine(),  # noqa: B008 (frozen)
    validate: Validate | None = None,
    validate_every: int | None = None,
    checkpoints: str | Path | None = None,
    loggers: Sequence[Logger] = (),
    longer: bool = False,
    description: str = "training",
) -> TrainingLog:
    """Train ``backbone`` and ``head``, where head(backbone(images), labels) is the loss, in place.

    Tables that a `gif.head.Head` moves, such as the code vectors of a `GIFLoss`, are trained in place too.

    In a `torch.distributed` process group, all processes call this with the same arguments, and train together: each
    step's batch is divided among them, gradients are averaged, and rank 0's initial values are everyone's. The order of
    images does not depend on how many processes there are.

    Args:
        backbone: images (B, c, h, w) in [-1, 1] to embeddings (B, d).
        head: embeddings and labels (B,) to a loss (); a `gif.head.Head` where it is asked for more.
        dataset: what to train on.
        config: how.
        augment: changes normalised images (B, c, h, w), on the device; draws from torch's generators alone.
        validate: named scores of the backbone, more is better; called on every process, which must agree on them. The
            checkpoint of the highest mean score is kept. It changes neither the losses nor the random numbers.
        validate_every: steps between two validations; an epoch where not given. The last step is always judged.
        checkpoints: folder in which the state is kept: a run that was killed continues there, and the same arguments
            give the same result as a run that was not. The number of processes may change; then the losses do, by
            rounding, and augmentation by other random numbers. SIGINT and SIGTERM end the run after the step, with a
            checkpoint, by Interrupted (a KeyboardInterrupt); of several processes, after the next tenth step.
        loggers: what takes the measures (`gif.training.loggers`).
        longer: a run in ``checkpoints`` that had fewer steps goes on to this many. The schedule is that of all steps,
            so the learning rate of a finished run rises again to what it is there.
        description: what the progress line says.

    Raises ValueError where data, batch, processes and packages do not fit, or another process writes to
    ``checkpoints``; FloatingPointError when the loss is no longer finite.
    """
    device = resolve_device(config.device)
    config = replace(config, device=str(device))
    keeper = None if checkpoints is None else Checkpoints(Path(checkpoints), config.keep)
    check_training(head, dataset, config, loggers=loggers)
    if config.patience is not None and validate is None:
        raise InputError("patience counts validations, and there is none; name something to judge by, or leave it out")

    average = None if config.ema is None else AverageBackbone(backbone, config.ema)
    model = _Trained(backbone, head, average, freeze(backbone, config.freeze)).to(device).train()
    judged = average or backbone
    if config.channels_last:
        backbone.to(memory_format=torch.channels_last)
    steps_an_epoch = len(dataset) // config.batch_size
    steps = config.steps_of(len(dataset))
    validate_steps = validate_every or steps_an_epoch
    state = TrainingState(
        model,
        config.make_optimizer([*backbone.parameters(), *head.parameters()]),
        GradScaler(device.type, enabled=config.precision == "fp16"),
        losses=torch.full((steps,), math.nan, device=device),
        tables={} if checkpoints is None else _tables(as_head(head), Path(checkpoints)),
    )
    with _kept(keeper) as stop:
        random = keeper.load(state, longer=longer) if keeper else {}
        before = state.step
        say_resumed(description, before, steps, "step")
        losses = _Losses(state.losses, state.step, REPORT_EVERY if state.scaler.is_enabled() else 1)
        take_step = _Step(backbone, head, augment, state, config)
        clock = _SaveClock(config)

        ended = is_stale(state.validations, config.patience)
        with monitor(description, steps, before, config.batch_size, device, loggers) as monitored:
            advance, report, report_scores = monitored
            began, processor_began = time.monotonic(), time.process_time()
            for epoch in range(before // steps_an_epoch, math.ceil(steps / steps_an_epoch)):
                if ended:
                    break
                loader_seed, order_seed = begin_epoch(config.seed, epoch, rank())
                position = state.step % steps_an_epoch
                if position:
                    restore_random(random, device)
                part = range(position, steps - epoch * steps_an_epoch)
                loader = _loader(head, dataset, config, part, loader_seed, order_seed)
                for images, labels in one_ahead(batches_of(loader), take_step.prepare):
                    done = state.step / steps
                    loss, embeddings, own_labels = take_step(images, labels, done)
                    losses.add(loss)
                    state.step += 1
                    if average is not None:
                        average.update(backbone, state.step)
                    if state.step % REPORT_EVERY == 0 or state.step == steps:
                        recent = losses.settle()[-(state.step % REPORT_EVERY or REPORT_EVERY) :].nanmean()
                        measures = _numbers({"loss": recent, **as_head(head).health(embeddings, own_labels)})
                        report(state.step, {"learning rate": config.rate(done), **measures})
                    scores = None
                    if validate and (state.step % validate_steps == 0 or state.step == steps):
                        state.validations[state.step] = scores = _scores(validate, model, judged, device)
                        report_scores(state.step, scores)
                        ended = is_stale(state.validations, config.patience)
                    epoch_ends = state.step % steps_an_epoch == 0
                    stopped = stop.agreed(epoch_ends or state.step % REPORT_EVERY == 0) if keeper else None
                    if scores or epoch_ends or stopped or (keeper and clock.due(state.step)):
                        losses.settle()
                        if keeper:
                            with clock.saving():
                                as_head(head).settle()
                                keeper.save(state)
                    if stopped:
                        raise Interrupted(
                            f"interrupted; the same command continues after step {state.step:,} of {steps:,}", stopped
                        )
                    advance()
                    if ended:
                        say_once(
                            f"training ends after step {state.step:,} of {steps:,}: the last {config.patience} "
                            "validations were no better than one before them"
                        )
                        break
            seconds, processor = time.monotonic() - began, time.process_time() - processor_began
    losses_taken, averaged = state.losses[: state.step].cpu(), None if average is None else average.network
    taken = state.step - before
    if not taken:
        return TrainingLog(losses_taken, math.nan, state.validations, average=averaged)
    whole = processor * state.step / taken
    return TrainingLog(losses_taken, taken * config.batch_size / seconds, state.validations, whole, averaged)


@contextmanager
def _kept(keeper: Checkpoints | None) -> Iterator[StopRequest]:
    """Hold the folder of the checkpoints, if there are any, and note interrupts so that another one can be written."""
    stop = StopRequest()
    if keeper is None:
        yield stop
        return
    with hold(keeper.folder, keeper.newest), stop:
        yield stop


class _Trained(nn.ModuleDict):
    """What a run trains: backbone and head, and the average of the backbone; frozen parts stay in eval mode."""

    def __init__(
        self, backbone: nn.Module, head: nn.Module, average: nn.Module | None, frozen: Sequence[nn.Module]
    ) -> None:
        self._frozen = tuple(frozen)
        super().__init__({"backbone": backbone, "head": head} | ({} if average is None else {"average": average}))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


def _scores(validate: Validate, model: nn.ModuleDict, judged: nn.Module, device: torch.device) -> dict[str, float]:
    """What ``validate`` says of the backbone that rank 0 has, which is the one that a checkpoint keeps.

    Random numbers go on as if it had not been called. Raises ValueError without a score, or for one that is NaN.
    """
    broadcast_buffers(judged)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        scores = {name: float(score) for name, score in validate(judged).items()}
    model.train()
    if not scores or not all(math.isfinite(score) for score in scores.values()):
        raise InputError(f"validation gave the scores {scores}, wanted at least one and finite numbers")
    return scores


@dataclass(frozen=True)
class _Part:
    """Labels of a micro-batch (b,) on the device, and what the head takes in their place."""

    labels: Tensor
    prepared: Any


class _Step:
    """One step of the optimizer on a process's share of a batch."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        augment: Callable[[Tensor], Tensor],
        state: TrainingState,
        config: TrainingConfig,
    ) -> None:
        self._backbone, self._head, self._augment, self._state, self._config = backbone, head, augment, state, config
        self._network = torch.compile(backbone) if config.compile else backbone
        self._without_exchange: Callable[[], AbstractContextManager[None]] = nullcontext
        if world_size() > 1 and any(parameter.requires_grad for parameter in backbone.parameters()):
            replicas = DistributedDataParallel(self._network)
            self._network, self._without_exchange = replicas, replicas.no_sync
        else:
            replicate(backbone)  # frozen: DistributedDataParallel refuses what has no gradient to exchange
        replicate(head)

    def prepare(self, batch: tuple[Tensor, Tensor], ahead: int) -> tuple[Tensor, list[_Part]]:
        """A loader's batch on the device, and its labels by micro-batch; ``ahead`` steps are taken before."""
        config, device = self._config, torch.device(self._config.device)
        images, labels = _full(*batch, config.batch_size // world_size())
        parts = 1 if config.micro_batch_size is None else math.ceil(len(images) / config.micro_batch_size)
        own = [
            _Part(some.to(device), as_head(self._head).prepare(some, device, ahead * parts + part))
            for part, some in enumerate(labels.tensor_split(parts))
        ]
        return to_device(images, device), own

    def __call__(self, images: Tensor, labels: list[_Part], done: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss (), and embeddings and labels of the last micro-batch, for images (B, c, h, w) uint8.

        ``done``: what share of the steps comes before.
        """
        config, optimizer, scaler = self._config, self._state.optimizer, self._state.scaler
        lr = config.rate(done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        as_head(self._head).begin_step(lr, lr / config.lr, done)
        before = RunningStatistics(self._backbone) if scaler.is_enabled() else None
        loss = torch.zeros((), device=images.device)
        own_labels = torch.cat([part.labels for part in labels])
        with torch.no_grad(), self._autocast(images.device):
            as_head(self._head).before_step(self._backbone, partial(self._pixels, images), own_labels)
        for some, part in zip(images.tensor_split(len(labels)), labels, strict=True):
            share = len(some) / len(images)
            exchange = nullcontext if part is labels[-1] else self._without_exchange
            with exchange(), as_head(self._head).share_of_a_step(share):
                embeddings = self._embed(self._pixels(some))
                part_loss = self._loss(embeddings, part.prepared) * share
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        if before is not None:
            before.restore()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self._backbone.parameters(), config.clip)
        scaler.step(optimizer)
        scaler.update()
        return loss, embeddings.detach(), labels[-1].labels

    def _pixels(self, images: Tensor) -> Tensor:
        """Normalised and augmented images (B, c, h, w), as the network gets them."""
        pixels = self._augment(normalize_pixels(images))
        return pixels.contiguous(memory_format=torch.channels_last) if self._config.channels_last else pixels

    def _embed(self, pixels: Tensor) -> Tensor:
        with self._autocast(pixels.device):
            embeddings: Tensor = self._network(pixels)
        return embeddings

    def _loss(self, embeddings: Tensor, labels: Any) -> Tensor:
        with self._autocast(embeddings.device) if as_head(self._head).under_autocast else nullcontext():
            loss: Tensor = self._head(embeddings, labels)
        return loss

    def _autocast(self, device: torch.device) -> autocast:
        precision = self._config.precision
        return autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


class _Losses:
    """The loss of each step: each process's own at first, settled now and then to their mean.

    ``patience``: so many steps in a row without a finite loss are an error: 1, and more where a loss scaler skips them.
    """

    def __init__(self, losses: Tensor, done: int, patience: int) -> None:
        self._losses, self._patience = losses, patience
        self._settled = self._done = done

    def add(self, loss: Tensor) -> None:
        self._losses[self._done] = loss
        self._done += 1

    def settle(self) -> Tensor:
        """The losses so far, the same on every process; raises FloatingPointError if the last are not finite."""
        fresh = self._losses[self._settled : self._done]
        fresh.copy_(mean_over_processes(fresh))
        self._settled = self._done
        losses = self._losses[: self._done]
        recent = losses[-self._patience :]
        if len(recent) == self._patience and not bool(recent.isfinite().any()):
            raise DivergedError(
                f"the loss is {float(losses[-1])} after {len(losses)} steps; lower lr, lengthen warmup or lower the "
                "scale"
            )
        return losses


class _SaveClock:
    """When the next checkpoint is due, decided alike on every process."""

    def __init__(self, config: TrainingConfig) -> None:
        self._steps, self._seconds = config.save_steps, 60 * config.save_minutes
        self._due = time.monotonic() + self._seconds

    def due(self, step: int) -> bool:
        if self._steps and step % self._steps == 0:
            return True
        return step % REPORT_EVERY == 0 and bool(least_of_processes(time.monotonic() >= self._due))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: the next one in time is due when what this took has become a small share."""
        begin = time.monotonic()
        yield
        end = time.monotonic()
        self._due = end + max(self._seconds, (end - begin) / LARGEST_SHARE)


def check_training(
    head: nn.Module, dataset: IdentityDataset, config: TrainingConfig, *, loggers: Sequence[Logger] = ()
) -> None:
    """Raise ValueError where data, device, batch, processes and packages do not fit, as `train` does, before work."""
    resolve_device(config.device)
    if len(dataset) < config.batch_size:
        raise InputError(f"the data set has {len(dataset)} images, fewer than a batch of {config.batch_size}")
    processes = world_size()
    if config.batch_size % processes or config.batch_size < 2 * processes:
        raise InputError(
            f"batch_size {config.batch_size} does not divide among {processes} processes, at least 2 images to each; "
            f"give a multiple of {processes}"
        )
    check_workers(config.workers, config.batch_size // processes, dataset.image_shape)
    as_head(head).check_processes(processes)
    for logger in loggers:
        logger.check()


def _tables(head: Head, folder: Path) -> dict[str, TableIncrements]:
    """How each table of the head is saved, in a folder of its own; the head marks the rows that move from now on."""
    tables = {name: TableIncrements(folder / name, table) for name, table in head.tables().items()}
    if tables:
        head.mark_moves({name: saved.changed for name, saved in tables.items()})
    return tables


def one_ahead(items: Iterable[_Item], prepare: Callable[[_Item, int], _Ready]) -> Iterator[_Ready]:
    """What ``prepare(item, ahead)`` makes of each item: of the next one before this one is given out.

    ``ahead``: how many that have not been given out yet, or are being used, come before it.
    """
    ready: _Ready | None = None
    for number, item in enumerate(items):
        behind, ready = ready, prepare(item, min(number, 1))
        if behind is not None:
            yield behind
    if ready is not None:
        yield ready


def _full(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A batch of ``count`` images: others of it take the places of those that could not be read.

    Every process then does the same work. Raises ValueError for an empty batch.
    """
    if len(images) == count:
        return images, labels
    if len(images) == 0:
        raise InputError(f"none of the {count} images of a batch can be read; look at the data set")
    places = torch.arange(count) % len(images)
    return images[places], labels[places]


def _loader(
    head: nn.Module, dataset: IdentityDataset, config: TrainingConfig, part: range, loader_seed: int, order_seed: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load this process's share of each batch of the steps ``part`` of an epoch, which may have fewer."""
    wanted = as_head(head)
    order = EpochOrder(
        len(dataset),
        config.batch_size,
        seed=order_seed,
        begin=part.start,
        end=part.stop,
        rank=rank(),
        processes=world_size(),
        groups=Groups(dataset.labels, wanted.group_size, wanted.grouped_share) if wanted.group_size > 1 else None,
        computed=dataset.computed,
    )
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=config.workers,
        collate_fn=dataset.collate,
        pin_memory=config.device == "cuda",
        worker_init_fn=leave_signals_to_the_command,
        generator=torch.Generator().manual_seed(loader_seed),
    )


def _numbers(measures: dict[str, Tensor]) -> dict[str, float]:
    """Average the measures over the processes; the device is waited for once, not once a measure."""
    means = mean_over_processes(torch.stack([value.float() for value in measures.values()]))
    return dict(zip(measures, means.tolist(), strict=True))
