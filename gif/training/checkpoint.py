"""Checkpoints of a training run: whole or absent, exact at any step, for any number of processes."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from gif.distributed import gather_objects, rank, wait_for_all
from gif.errors import InputError, MissingFileError
from gif.files import fsync, load_tensors, save_tensors
from gif.training.journal import TableJournal

FORMAT = "gif.training_progress/1"


@dataclass
class TrainingState:
    """What a run needs to continue, beside the random state of each process.

    The learning rate and the order of images are functions of ``step``. Everything here is the same on each process.
    ``model`` has a part named backbone; ``losses`` are (steps,); ``tables`` are what a head changes beside parameters;
    ``validations`` are the named scores after some numbers of steps, ascending.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    losses: Tensor
    tables: Mapping[str, TableJournal]
    step: int = 0
    validations: dict[int, dict[str, float]] = field(default_factory=dict)


class Checkpoints:
    """Checkpoints step-000000100, ... in ``folder``: the newest ``keep``, and the best: of the highest mean score.

    Each is written beside its place, synced and renamed into it, so a killed run leaves the one before. It holds the
    model and the optimizer (`torch.distributed.checkpoint`), and in progress.safetensors the losses, every process's
    random state and the names of the journal's files that restore the tables.

    With several processes the first writes, and all read: the folder must be one that all of them see.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, state: TrainingState) -> None:
        """Write the state after ``state.step`` steps."""
        random = gather_objects(_random_state(state.losses.device))
        if rank() == 0:
            self._write(state, random)
            self._remove_old(state.tables)
        wait_for_all()

    def load(self, state: TrainingState) -> dict[str, Tensor]:
        """Restore the newest state in place, if there is one, and return the random state of this process's rank.

        That is empty if there is no checkpoint, or if the run that wrote it had fewer processes.

        Raises ValueError if it is of a run with another number of steps.
        """
        places = self._places()
        if not places:
            return {}
        tensors, progress = _read_progress(places[-1])
        if tensors["losses"].shape != state.losses.shape:
            raise InputError(
                f"{places[-1]} is of a run of {len(tensors['losses'])} steps, this one has {len(state.losses)}; give "
                "the same data set, batch_size and epochs, or another folder"
            )
        model, optimizer = get_state_dict(state.model, state.optimizer)
        stored: dict[str, Any] = {"model": model, "optimizer": optimizer}
        with _single_process():
            dcp.load(stored, checkpoint_id=places[-1], no_dist=True)
        set_state_dict(
            state.model, state.optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"]
        )
        state.scaler.load_state_dict(progress["scaler"])
        state.losses.copy_(tensors["losses"])
        state.step = progress["step"]
        state.validations = _validations(progress)
        for name, journal in state.tables.items():
            journal.load(progress["tables"][name])
        prefix = f"random.{rank()}."
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    def load_best(self, backbone: nn.Module) -> int:
        """Give ``backbone`` its weights of the checkpoint that validated best; returns how many steps that had.

        Of equally good ones it is the first. Raises FileNotFoundError if none was validated.
        """
        best = self._best()
        if best is None:
            raise MissingFileError(f"no checkpoint in {self._folder} was validated; train with `validate`")
        stored = {"model": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}}
        with _single_process():
            dcp.load(stored, checkpoint_id=best, no_dist=True)
        backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in stored["model"].items()})
        return int(_read_progress(best)[1]["step"])

    def _write(self, state: TrainingState, random: list[dict[str, Tensor]]) -> None:
        place = self._folder / f"step-{state.step:09d}"
        temporary = _beside(place)
        shutil.rmtree(temporary, ignore_errors=True)
        model, optimizer = get_state_dict(state.model, state.optimizer)
        with _single_process():
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=temporary, no_dist=True)
        tensors = {f"random.{of}.{kind}": value for of, kinds in enumerate(random) for kind, value in kinds.items()}
        progress = {
            "step": state.step,
            "scaler": state.scaler.state_dict(),
            "tables": {name: journal.save(state.step) for name, journal in state.tables.items()},
            "validations": list(state.validations.items()),
        }
        save_tensors(
            temporary / "progress.safetensors",
            {"losses": state.losses, **tensors},
            format=FORMAT,
            progress=json.dumps(progress),
        )
        fsync(temporary)
        temporary.rename(place)
        fsync(self._folder)

    def _remove_old(self, tables: Mapping[str, TableJournal]) -> None:
        """Keep the newest checkpoints and the best; of the tables, what the newest need."""
        places = self._places()
        newest = places[-self._keep :]
        for place in set(places) - {*newest, self._best()}:
            _remove(place)
        for name, journal in tables.items():
            journal.remove_others({file for place in newest for file in _read_progress(place)[1]["tables"][name]})

    def _places(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if re.fullmatch(r"step-\d{9}", path.name))

    def _best(self) -> Path | None:
        scores = {}
        for place in self._places():
            progress = _read_progress(place)[1]
            found = _validations(progress).get(progress["step"])
            if found is not None:
                scores[place] = mean_score(found)
        return max(scores, key=lambda place: scores[place]) if scores else None


def mean_score(scores: Mapping[str, float]) -> float:
    """What makes a checkpoint the best one: the mean of its named scores."""
    return sum(scores.values()) / len(scores)


def restore_random(random: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to a state that `Checkpoints.load` returned; those it does not name stay as they are."""
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if "cuda" in random and device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _read_progress(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = load_tensors(place / "progress.safetensors", format=FORMAT)
    return tensors, json.loads(metadata["progress"])


def _validations(progress: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    return dict(progress.get("validations", []))


def _remove(place: Path) -> None:
    """Remove a checkpoint: none whose removal was interrupted is taken for a whole one."""
    if place.exists():
        shutil.rmtree(_beside(place), ignore_errors=True)
        place.rename(_beside(place))
        shutil.rmtree(_beside(place))


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.tmp")


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the warning that there is no process group: the first process writes for all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
