"""`gif run`: everything, on any data set, in one command."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import is_torchelastic_launched

from gif.backbones import BackboneConfig
from gif.codes.commands import tokenize_command
from gif.data import HELD_OUT, IdentityDataset, IdentitySplit, ImageDecoder, load_data, open_data
from gif.data.encoded import EncodedImages, check_identities, left_out
from gif.data.inspection import draw_data, look_through
from gif.data.survey import Survey, survey
from gif.encoders.basis import basis_path
from gif.errors import InputError
from gif.evaluation.command import evaluate
from gif.experiments.glyph_bench import CONTENDERS, folder_name
from gif.files import read_json, write_text
from gif.options import options_of
from gif.ownership import existing, hold
from gif.progress import new_table, print_table, progress, say
from gif.resume import RECORD, claim_folder
from gif.run import choices
from gif.run.choices import Choice
from gif.run.report import CHOICES, Trained, data_files, write_report
from gif.run.stages import Stage, StageRecord, Timing, run_stages
from gif.settings import Sections, call, check, read_sections, write_sections
from gif.training import AUGMENTATIONS, TrainingConfig
from gif.training.command import MOST_KEPT, train_command
from gif.training.trial import seconds_a_step
from gif.vectors.commands import spread_command, spread_reports, vectors_command

CONFIG = "config.yaml"
MAIN = "GIF"
COMMANDS: dict[str, Callable[..., None]] = {  # whose settings config.yaml has
    "vectors": vectors_command,
    "spread": spread_command,
    "tokenize": tokenize_command,
    "train": train_command,
    "evaluate": evaluate,
}
MOST_DECODED = 50_000  # images that are all decoded before the work; of more, training finds the broken ones
StageName = Literal["choices", "vectors", "spread", "codes", "train", "judge", "report"]


@dataclass(frozen=True)
class RunConfig:
    """What a run is of, and what is not left to it.

    Args:
        data: the data set, a name or a path: a folder with a folder an identity, a .rec file or its folder, tar shards,
            glyphs, glyph-words (docs/data.md).
        identities: how many of the data set's, at random, such as 1e4; all where it is not given.
        held_out: share of the identities that training never sees, or how many; chosen from the data where it is not
            given. 0 trains on all and judges nothing.
        minutes: to train each head for, about; 10 at most where neither this, steps nor epochs is given.
        steps: of the optimizer, for each head.
        epochs: passes over the training images, for each head.
        beside: heads to train and judge beside GIF, on the same images, codes and steps: '["full softmax"]', and others
            of `gif accuracy`.
        device: where to compute; "auto" takes a GPU if there is one.
        workers: processes that read images; chosen where it is not given.
        seed: of everything random.
        until: the last stage to do. After "choices" config.yaml may be changed; the same command without it goes on.
    """

    data: str
    identities: float | None = None
    held_out: int | float | None = None
    minutes: float | None = None
    steps: int | None = None
    epochs: int | None = None
    beside: list[str] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    seed: int = 0
    until: StageName | None = None

    def __post_init__(self) -> None:
        choices.Budget(self.minutes, self.steps, self.epochs)
        if unknown := [name for name in self.heads[1:] if name not in CONTENDERS or name == MAIN]:
            others = ", ".join(name for name in CONTENDERS if name != MAIN)
            raise InputError(f"beside has {', '.join(unknown)}; there are {others}")

    @property
    def heads(self) -> tuple[str, ...]:
        """GIF, and those beside it."""
        return (MAIN, *(self.beside or ()))

    @property
    def budget(self) -> choices.Budget:
        """How long training may take."""
        return choices.Budget(self.minutes, self.steps, self.epochs)

    def settings(self) -> dict[str, Any]:
        """What a run is known by: all but what the run itself decides later, and how far to go now."""
        return {name: value for name, value in asdict(self).items() if name not in ("until", "device", "workers")}


@options_of(RunConfig)
def run_command(output: Path, *, config: RunConfig) -> None:
    """Do everything, on any data set: look at it, make codes, train, judge on identities never seen, write a report.

    Sizes, colours, augmentation, network, batch, codes and length of training are chosen from the data and the machine.
    Each choice is printed with its reason and written to output/config.yaml, which every stage's --config takes:
    gif train --config output/config.yaml --output elsewhere. A run that was interrupted or killed, in whichever stage,
    continues when the same command is given again.

    Args:
        output: folder for the report (report.html, report.md) and everything it is made of.
    """
    run(output, config)


def run(output: Path, config: RunConfig) -> None:
    """Do all stages of a run in ``output``, or go on with them. Raises what the stages raise."""
    if is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"gif run is one process's; give --until choices to it, and then each stage to torchrun with --config "
            f"{output / CONFIG}"
        )
    with hold(output, existing(output / CONFIG)):
        _Run(output, config).go()


@dataclass(frozen=True)
class _Places:
    """Where a run keeps what."""

    folder: Path

    @property
    def vectors(self) -> Path:
        return self.folder / "vectors.safetensors"

    @property
    def spread(self) -> Path:
        return self.folder / "spread.safetensors"

    @property
    def codes(self) -> Path:
        return self.folder / "codes.safetensors"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


class _Run:
    """One run: its folder, what it is of, and the data set, opened once."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.began = time.monotonic()
        self.whole = self._open(choices.LARGEST, 3)

    def go(self) -> None:
        report, chosen = self.folder / "report.html", self.folder / CONFIG
        device = choices.choose_device(self.config.device)
        self._claim()
        if chosen.exists() and self._is_done():
            self._say_result()
            say(
                f"this run is already finished, its report is {report}; to repeat it remove {self.folder}, or give "
                "another --output"
            )
            return
        self._choose(device)
        if self.config.until == "choices":
            say(f"the choices are in {chosen}; change them there, and give the command without --until")
            return
        sections = self._settings()
        for name, command in COMMANDS.items():
            check(command, sections[name], f"{chosen}, {name}")
        run_stages(self._stages(sections), self.folder, self.config.until)
        if self.config.until in (None, "report"):
            self._say_result()
            say(f"done in {time.monotonic() - self.began:.0f} s; the report is {report}")

    def _claim(self) -> None:
        """Make the folder this run's; where nothing was chosen yet, an earlier try may have been told otherwise."""
        settings = {"command": "run", **self.config.settings(), "data": self._summary()}
        record = self.folder / RECORD
        if record.exists() and not (self.folder / CONFIG).exists() and read_json(record).get("command") == "run":
            write_text(record, json.dumps(settings, indent=2))
        claim_folder(self.folder, settings)

    def _settings(self) -> Sections:
        """The settings of each stage, as they are in config.yaml."""
        return read_sections(self.folder / CONFIG, wanted=tuple(COMMANDS))

    def _is_done(self) -> bool:
        record = StageRecord(self.folder).read()
        return all(stage.is_done(record.get(stage.name)) for stage in self._stages(self._settings()))

    def _open(self, size: int, channels: int) -> IdentityDataset:
        decoder = ImageDecoder(size, channels)
        return open_data(self.config.data, identities=self.config.identities, seed=0, decoder=decoder)

    def _summary(self) -> dict[str, Any]:
        """What tells the data set from another: not how its images are read, which is chosen."""
        summary = self.whole.summary()
        return {name: value for name, value in summary.items() if name != "read as"}

    def _choose(self, device: Choice) -> None:
        """Look through the data set and choose every setting, or take what was chosen before."""
        path = self.folder / CONFIG
        if path.exists():
            say(f"settings are those in {path}, as they were chosen before")
            if not all(file.exists() for file in data_files(self.folder)):
                self._look_through(self._settings()["train"]["training"].get("workers", 0))
            return
        config, seen = self.config, survey(self.whole)
        held = choices.choose_held_out(self.whole, config.data, config.held_out)
        if config.identities is not None and isinstance(held.number, int) and held.number > 1:
            share = held.number / self.whole.num_identities
            held = choices.Held(
                share, "so large a share: identities are taken of those held out and of the others alike"
            )
        size, channels = choices.choose_size(seen, self.whole), choices.choose_channels(seen, self.whole)
        workers = choices.choose_workers(config.workers, seen, device.value, (channels.value, size.value, size.value))
        split = self._split(held.number, size.value, channels.value)
        if len(split.held_out) and int(split.held_out.image_counts().max()) < 2:
            raise InputError(
                f"none of the {split.held_out.num_identities} identities that are held out has two images, so there is "
                "no genuine pair to judge by; give another --held_out, or 0 to train on all and judge nothing"
            )
        self._look_through(workers.value)
        chosen, sections = self._sections(seen, held, size, channels, device, workers, split)
        _print_choices(chosen)
        write_text(self.folder / CHOICES, json.dumps([asdict(each) for each in chosen], indent=2))
        title = f"{shlex.join(['gif', 'run', '--data', config.data, '--output', str(self.folder)])}\n" + (
            "chose these settings; each stage takes them with --config, and what is given after it wins."
        )
        write_sections(path, sections, {f"{each.what} {each.value}": each.why for each in chosen}, title)

    def _split(self, held_out: int | float, size: int, channels: int) -> IdentitySplit:
        decoder = ImageDecoder(size, channels)
        config = self.config
        return load_data(config.data, identities=config.identities, held_out=held_out, decoder=decoder)

    def _look_through(self, workers: int) -> None:
        """Decode all images of a set that is not large, so that broken ones are named before the work."""
        images = self.whole
        if isinstance(images, EncodedImages):
            if len(images) <= MOST_DECODED:
                look_through(images, workers)
            check_identities(images, torch.arange(len(images)), workers)
        draw_data(images, self.folder / "data")
        gone = (left_out(images) or "").splitlines()
        facts = {
            "data": images.origin,
            "identities": images.num_identities,
            "images": len(images),
            "left out": gone,
        }
        write_text(data_files(self.folder)[0], json.dumps(facts, indent=2, ensure_ascii=False))
        for line in gone:
            say(line)

    def _sections(
        self,
        seen: Survey,
        held: choices.Held,
        size: Choice,
        channels: Choice,
        device: Choice,
        workers: Choice,
        split: IdentitySplit,
    ) -> tuple[list[Choice], Sections]:
        """Every choice, and the settings of each stage that follow."""
        config, train = self.config, split.train
        batch = choices.choose_batch(len(train), device.value)
        augmentation = choices.choose_augmentation(seen, self.whole)
        pixels = channels.value * size.value**2
        kept = seen.fixed or (workers.value == 0 and len(train) * pixels <= MOST_KEPT)
        reading = 0.0 if kept else seen.seconds * batch.value / max(1, workers.value)
        network, why = self._network(size, channels, batch, augmentation, device, split, reading)
        backbone = network.backbone
        if backbone.image_size != size.value:
            why_size = f"{size.why}; {size.value} would leave this {device.value} too few steps"
            size = Choice("image_size", backbone.image_size, why_size)
        steps = choices.choose_steps(config.budget, len(train), batch.value, network.seconds)
        code, why_code = choices.choose_codes(train.num_identities)
        rate = choices.LR * min(1.0, batch.value / choices.LR_BATCH)
        few = steps.value < choices.FEW_STEPS
        spread = choices.SPREAD_EPOCHS[train.num_identities > choices.MANY_IDENTITIES]
        statistics = Choice(
            "statistics",
            "recomputed" if few else "running",
            f"after {choices.counted(steps.value, 'step')} the running ones "
            f"{'are behind the weights' if few else 'have caught up'}",
        )
        chosen = [
            Choice("held_out", held.number, held.why),
            size,
            channels,
            augmentation,
            device,
            Choice("backbone", f"{backbone.name} {backbone.width}" if backbone.name == "small" else backbone.name, why),
            Choice("embedding_size", backbone.embedding_size, f"what the field gives {backbone.name} networks"),
            Choice("codes", f"{code.length} tokens of {code.vocab_size}", why_code),
            Choice(
                "spread epochs",
                spread,
                f"{train.num_identities:,} identities: a matter of seconds"
                if spread == choices.SPREAD_EPOCHS[0]
                else "three do nearly all there is to do",
            ),
            batch,
            steps,
            Choice("lr", rate, f"{choices.LR} for batches of {choices.LR_BATCH}, in proportion below"),
            statistics,
            workers,
        ]
        training = TrainingConfig(
            steps=steps.value,
            batch_size=batch.value,
            lr=rate,
            seed=config.seed,
            device=device.value,
            workers=workers.value,
            precision="bf16" if device.value == "cuda" else "fp32",
            channels_last=device.value == "cuda",
        )
        at = self._places()
        place = {"vectors": str(at.vectors), "spread": str(at.spread), "codes": str(at.codes)}
        data = self.whole.origin if isinstance(self.whole, EncodedImages) else config.data
        source = {"data": data, "identities": config.identities, "held_out": held.number}
        reads = {"workers": workers.value, "device": device.value}
        model = at.folder / folder_name(MAIN)
        return chosen, {
            "run": {**config.settings(), "data": data, "output": str(at.folder)},
            "vectors": {
                "output": place["vectors"],
                **source,
                "encoder": "pixels",
                "width": backbone.embedding_size,
                "image_size": backbone.image_size,
                **reads,
            },
            "spread": {
                "vectors": place["vectors"],
                "output": place["spread"],
                "epochs": spread,
                "seed": config.seed,
                "device": device.value,
            },
            "tokenize": {
                "vectors": place["spread"],
                "output": place["codes"],
                "vocab_size": code.vocab_size,
                "length": code.length,
                "seed": config.seed,
                "device": device.value,
            },
            "train": {
                "output": str(model),
                **source,
                "codes": place["codes"],
                "vectors": place["spread"],
                "head": {"kind": "gif", "recipe": "live"},
                "backbone": asdict(backbone),
                "training": {name: value for name, value in asdict(training).items() if name != "epochs"},
                "augmentation": augmentation.value,
                "statistics": statistics.value,
            },
            "evaluate": {"model": str(model / "backbone.safetensors"), "output": str(model), **source, **reads},
        }

    def _network(
        self,
        size: Choice,
        channels: Choice,
        batch: Choice,
        augmentation: Choice,
        device: Choice,
        split: IdentitySplit,
        reading: float,
    ) -> tuple[choices.Network, str]:
        """The backbone, after a few steps of each that is tried."""
        images = len(split.train)
        tried = choices.candidates(size.value, channels.value, images, device.value)
        budget = self.config.budget
        steps_an_epoch = max(1, images // batch.value)
        wanted = budget.steps or (budget.epochs or choices.FEWEST_EPOCHS) * steps_an_epoch
        augment = AUGMENTATIONS[augmentation.value]
        if len(tried) == 1 and (budget.steps or budget.epochs):
            return choices.Network(tried[0], math.nan), f"the one for images of {size.value} pixels"
        with progress("timing steps", len(tried), "networks") as advance:
            timed = 0

            def time_step(backbone: BackboneConfig) -> float:
                nonlocal timed
                took = seconds_a_step(backbone, batch.value, augment, device.value)
                advance(1)
                timed += 1
                return took + reading

            found = choices.choose_network(tried, time_step, wanted, 60 * (budget.minutes or choices.MINUTES))
            advance(len(tried) - timed)  # smaller ones need no try
        return found

    def _stages(self, sections: Sections) -> list[Stage]:
        """The stages after the choices, with the settings that config.yaml has for each, in this folder."""
        at = self._places()

        def work(section: str, **changed: Any) -> Callable[[], None]:
            settings = {name: str(value) if isinstance(value, Path) else value for name, value in changed.items()}
            where = f"{self.folder / CONFIG}, {section}"
            return partial(call, COMMANDS[section], {**sections[section], **settings}, where)

        vectors = work("vectors", output=at.vectors)
        spread = work("spread", output=at.spread, vectors=at.vectors)
        tokenize = work("tokenize", output=at.codes, vectors=at.spread)
        stages = [
            Stage("vectors", "code vectors of the training identities", [at.vectors, basis_path(at.vectors)], vectors),
            Stage("spread", "spreading them over the sphere", [at.spread, *spread_reports(at.spread)], spread),
            Stage("codes", "identity codes", [at.codes], tokenize),
        ]
        judging = []
        for head in self.config.heads:
            own = at.folder / folder_name(head)
            model, scores = own / "backbone.safetensors", own / "evaluation.json"
            changed = _of_head(head, sections["train"])
            train = work("train", output=own, codes=at.codes, vectors=at.spread, **changed)
            trained = [model, own / "head.safetensors", own / "losses.safetensors"]
            stages.append(Stage(f"train {head}", f"training with {head}", trained, train))
            judge = work("evaluate", output=own, model=model)
            judging.append(Stage(f"judge {head}", f"judging {head} on identities never seen", [scores], judge))
        if sections["evaluate"].get("held_out") != 0:
            stages += judging
        reports = [at.report, at.report.with_suffix(".md")]
        return [*stages, Stage("report", "the report", reports, partial(self._report, sections))]

    def _places(self) -> _Places:
        return _Places(self.folder.resolve())

    def _report(self, sections: Sections) -> None:
        train = sections["train"]
        backbone = BackboneConfig(**train["backbone"])
        split = self._split(train.get("held_out", HELD_OUT), backbone.image_size, backbone.channels)
        write_report(self.folder, self.config.data, split, self._trained(sections), sections["evaluate"])

    def _trained(self, sections: Sections) -> list[Trained]:
        record = StageRecord(self.folder).read()
        batch = TrainingConfig(**sections["train"]["training"]).batch_size
        timings = {head: record.get(f"train {head}", Timing()) for head in self.config.heads}
        return [
            Trained(head, self.folder / folder_name(head), batch, timing.seconds if timing.begun == 1 else None)
            for head, timing in timings.items()
        ]

    def _say_result(self) -> None:
        sections = self._settings()
        if sections["evaluate"].get("held_out") == 0:
            say("nobody was held out, so nothing is judged")
            return
        table = new_table("head", "images/s", *_MEASURES, title="held-out identities, never seen in training")
        for each in self._trained(sections):
            numbers = each.numbers()
            table.add_row(each.head, each.speed(), *(numbers.get(name, "") for name in _MEASURES))
        print_table(table)


_MEASURES = ("rank-1", "TAR@0.001", "TAR@0.0001", "pairs")


def _of_head(head: str, train: dict[str, Any]) -> dict[str, Any]:
    """What of the settings of training is another head's."""
    if head == MAIN:
        return {}
    contender = CONTENDERS[head]
    rate = contender.lr / choices.LR * train["training"]["lr"]
    return {"head": asdict(contender.head), "training": {**train["training"], "lr": rate}}


def _print_choices(chosen: Sequence[Choice]) -> None:
    table = new_table("setting", "chosen", "because", title="choices")
    for each in chosen:
        table.add_row(each.what, str(each.value), each.why)
    print_table(table)
