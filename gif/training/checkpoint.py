"""Checkpoints of a training run: whole or absent, exact at any step, for any number of processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gif.distributed import first_decides, gather_objects, rank, wait_for_all
from gif.errors import DamagedFileError, InputError, MissingFileError, in_short
from gif.files import check_file, fsync, load_tensors, locate_tensor, read_metadata, remove_temporaries, save_tensors
from gif.progress import say
from gif.training.increments import TableIncrements

FORMAT = "gif.training_state/2"
STATE = "state.safetensors"
AVERAGE = "model.average.network."  # before the names of averaged weights
_PICKLED = (".metadata", "progress.safetensors")  # of version 1, which torch.distributed.checkpoint wrote


@dataclass
class TrainingState:
    """What a run needs to continue, beside the random state of each process.

    The learning rate and the order of images are functions of ``step``. Everything here is the same on each process.
    ``model`` has a part named backbone, and one named average where it is averaged; ``losses`` are (steps,); ``tables``
    are what a head changes beside parameters; ``validations`` are the named scores after some numbers of steps,
    ascending.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    losses: Tensor
    tables: Mapping[str, TableIncrements]
    step: int = 0
    validations: dict[int, dict[str, float]] = field(default_factory=dict)


class Checkpoints:
    """Checkpoints step-000000100, ... in ``folder``: the newest ``keep``, and the best: of the highest mean score.

    Each is written beside its place, synced and renamed into it, so a killed run leaves the one before. It is one file,
    state.safetensors, with a checksum: the model, the optimizer, the losses, every process's random state, and the
    names of the files that restore the tables.

    With several processes the first writes, and each what it has of a divided table, and all read: the folder must be
    one that all of them see.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self._keep = keep

    def newest(self) -> Path | None:
        """Return the folder of the newest checkpoint, or None where there is none."""
        return next(reversed(self._places()), None)

    def steps(self) -> int:
        """How many steps the run has, as its newest checkpoint says, whether they are done or not; 0 without one."""
        place = self.newest()
        return 0 if place is None else locate_tensor(place / STATE, "losses", format=FORMAT).shape[0]

    def save(self, state: TrainingState) -> None:
        """Write the state after ``state.step`` steps."""
        random = gather_objects(_random_state(state.losses.device))
        tables = {name: table.save(state.step) for name, table in state.tables.items()}
        if rank() == 0:
            self._write(state, random, tables)
            self._remove_old(state.tables)
        wait_for_all()

    def load(self, state: TrainingState, *, longer: bool = False) -> dict[str, Tensor]:
        """Restore the newest whole state in place, if there is one, and return the random state of this process's rank.

        That is empty if there is no checkpoint, or if the run that wrote it had fewer processes. Checkpoints that are
        damaged are named and removed, as are those after the one that is restored. ``longer``: the checkpoint may be of
        a run of fewer steps, which goes on to more.

        Raises DamagedFileError, and removes nothing, where there are checkpoints and none is whole; InputError if it is
        of a run with another number of steps, of another network, or of a version that kept pickles, or where the
        model's state is not tensors alone, which `save` could not write.
        """
        _model_state(state)
        place = first_decides(lambda: self._newest_whole(state.tables))
        if place is None:
            return {}
        tensors, progress = _read(place)
        before = len(tensors["losses"])
        if before != len(state.losses) and not (longer and before < len(state.losses)):
            raise InputError(
                f"{place} is of a run of {len(tensors['losses'])} steps, this one has {len(state.losses)}; give "
                "the same data set, batch_size and epochs, or another folder"
            )
        _fill(state.model, _part(tensors, "model."), place)
        _fill_optimizer(state, _part(tensors, "optimizer."), progress["optimizer"], place)
        state.scaler.load_state_dict(progress["scaler"])
        state.losses[:before] = tensors["losses"].to(state.losses.device)
        state.step = progress["step"]
        state.validations = dict(progress["validations"])
        for name, table in state.tables.items():
            table.load(progress["tables"][name])
        if rank() == 0:
            self._remove_old(state.tables)  # which a run that was killed here, at its last step, has left
        return _part(tensors, f"random.{rank()}.")

    def load_best(self, backbone: nn.Module) -> int:
        """Give ``backbone`` its weights of the checkpoint that validated best; returns how many steps that had.

        They are the averaged ones where the run averages. Of equally good ones it is the first. Raises
        FileNotFoundError if none was validated.
        """
        best = self._best()
        if best is None:
            raise MissingFileError(f"no checkpoint in {self.folder} was validated; train with `validate`")
        try:
            tensors, progress = _read(best)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}, or remove {best}, and the next best is taken") from error
        _fill(backbone, _part(tensors, AVERAGE) or _part(tensors, "model.backbone."), best)
        return int(progress["step"])

    def _newest_whole(self, tables: Mapping[str, TableIncrements]) -> Path | None:
        """The newest checkpoint that can be restored; removes what is damaged, and what was after it."""
        remove_temporaries(self.folder, held=True)
        for left in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        damaged: dict[Path, DamagedFileError | MissingFileError] = {}
        newest: Path | None = None
        for place in reversed(self._places()):
            try:
                files = self._check(place)
                if newest is None:
                    for name, table in tables.items():
                        table.check(files[name])
                    newest = place
            except (DamagedFileError, MissingFileError) as error:
                damaged[place] = error
        if newest is None and damaged:
            first = next(iter(damaged.values()))
            raise DamagedFileError(
                f"{first}: no checkpoint in {self.folder} is whole; remove that folder to begin anew"
            ) from first
        for place, reason in damaged.items():
            say(f"{reason}: {place.name} is removed, and the run continues from {newest and newest.name}")
            _remove(place)
        return newest

    def _check(self, place: Path) -> dict[str, list[str]]:
        """The tables' files that a checkpoint names; raises unless its own file is whole."""
        if not (place / STATE).exists() and any((place / name).exists() for name in _PICKLED):
            raise InputError(
                f"{place} is a checkpoint of an older version, which kept it as a pickle, and a pickle is not read; "
                f"finish the run with the version that began it, or remove {self.folder} to begin anew"
            )
        check_file(place / STATE)
        files: dict[str, list[str]] = _read_progress(place)["tables"]
        return files

    def _write(self, state: TrainingState, random: list[dict[str, Tensor]], tables: dict[str, list[str]]) -> None:
        place = self.folder / f"step-{state.step:09d}"
        temporary = _beside(place)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        optimizer, scalars = _optimizer_state(state)
        progress = {
            "step": state.step,
            "scaler": state.scaler.state_dict(),
            "optimizer": scalars,
            "tables": tables,
            "validations": list(state.validations.items()),
        }
        tensors = {f"model.{name}": value for name, value in _model_state(state).items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        tensors |= {f"random.{of}.{kind}": value for of, kinds in enumerate(random) for kind, value in kinds.items()}
        tensors["losses"] = state.losses
        save_tensors(temporary / STATE, tensors, format=FORMAT, progress=json.dumps(progress))
        fsync(temporary)
        temporary.rename(place)
        fsync(self.folder)

    def _remove_old(self, tables: Mapping[str, TableIncrements]) -> None:
        """Keep the newest checkpoints and the best; of the tables, what the newest need."""
        places = self._places()
        newest = places[-self._keep :]
        for place in set(places) - {*newest, self._best()}:
            _remove(place)
        for name, table in tables.items():
            table.remove_others({file for place in newest for file in _read_progress(place)["tables"][name]})

    def _places(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{9}", path.name))

    def _best(self) -> Path | None:
        scores = {}
        for place in self._places():
            progress = _read_progress(place)
            found = dict(progress["validations"]).get(progress["step"])
            if found is not None:
                scores[place] = mean_score(found)
        return max(scores, key=lambda place: scores[place]) if scores else None


def mean_score(scores: Mapping[str, float]) -> float:
    """Return the mean of the named scores: the checkpoint with the highest is the best one."""
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


def _model_state(state: TrainingState) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = state.model.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"the state of {name} is a {type(value).__name__}; checkpoints keep tensors alone")
    return tensors


def _optimizer_state(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What the optimizer keeps of each parameter: tensors by parameter.key, and what is no tensor by parameter and key.

    Its settings are the run's own, and not kept.
    """
    names = _parameter_names(state)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}.{key}"] = value
            else:
                scalars.setdefault(names[index], {})[key] = value
    return tensors, scalars


def _fill_optimizer(
    state: TrainingState, tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]], place: Path
) -> None:
    """Give the optimizer the state that `_optimizer_state` took from it."""
    parameters = dict(state.model.named_parameters())
    index = {name: number for number, name in enumerate(_parameter_names(state))}
    stored: dict[int, dict[str, Any]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in index or value.shape not in (parameters[name].shape, ()):
            raise InputError(f"{place} keeps {full}, of another network; give the same arguments, or another folder")
        stored.setdefault(index[name], {})[key] = value
    for name, values in scalars.items():
        stored.setdefault(index[name], {}).update(values)
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": stored, "param_groups": groups})


def _parameter_names(state: TrainingState) -> list[str]:
    """Return the names that the optimizer's parameters have in the model, in the order in which it holds them."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return [names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def _fill(module: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"{place} is of another backbone or head ({in_short(error)}); give the same arguments, or another folder"
        ) from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, _ = load_tensors(place / STATE, format=FORMAT)
    return tensors, _read_progress(place)


def _read_progress(place: Path) -> dict[str, Any]:
    """Read what a checkpoint keeps beside its tensors: it is in the header, so no tensor is read."""
    metadata = read_metadata(place / STATE, format=FORMAT)
    try:
        progress: dict[str, Any] = json.loads(metadata["progress"])
        return progress | {"validations": {int(step): dict(scores) for step, scores in progress["validations"]}}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{place} is damaged: what it says of its progress cannot be read ({error})") from error


def _remove(place: Path) -> None:
    """Remove a checkpoint: none whose removal was interrupted is taken for a whole one."""
    if place.exists():
        shutil.rmtree(_beside(place), ignore_errors=True)
        place.rename(_beside(place))
        shutil.rmtree(_beside(place))


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.tmp")
