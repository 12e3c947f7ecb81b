"""The words of a command line, as they are written in a shell, and as its parser takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gif.errors import InputError

DEBUG = "--debug"
CONFIGS = Path(__file__).parent / "configs"
"""Recipes that come with the package; `--config` takes one by its name."""
CONFIG = "--config"
FLAGS = ("--quick",)  # which mean true where no value follows
WITHOUT_VALUE = ("-h", "--help", "--print_config")
ALIASES = {
    "--closed_form": "--start",  # which torchrun takes for a short form of its own --start-method
    "--input": "--data",  # as it was called in `gif data`
}
BY_THEMSELVES = {"embed": "embed_command", "verify": "verify_command"}
"""Commands whose images stand by themselves, without an option's name, and their functions."""
AS_ONE_LIST = "embed"  # takes any number of them
NUMBER = re.compile(r"-[\d.]")  # which begins like an option, and is a value


def parsed(given: Sequence[str]) -> list[str]:
    """``given``, as its parser takes it; --debug, which may stand anywhere, is left out.

    Options by their first names; flags with a value; configs by their path; several words after an option as one list,
    --pairs '["a.bin", "b.bin"]' of --pairs a.bin b.bin. Where images stand by themselves an option has one value, and
    they are the last words.

    Raises ValueError for a config by a name that no recipe has.
    """
    words = [word for word in given if word != DEBUG]
    takes_images = bool(words) and words[0] in BY_THEMSELVES
    arguments: list[str] = []
    images: list[str] = []
    for first, *values in _options(words):
        if not first.startswith("-"):
            arguments += [first] if takes_images else [first, *values]
            images += values if takes_images else []
            continue
        name, sign, value = first.partition("=")
        if takes_images:
            own = 0 if sign or name in WITHOUT_VALUE else 1
            values, images = values[:own], [*images, *values[own:]]
        arguments += _option(ALIASES.get(name, name), [value, *values] if sign else values, sign)
    if words[:1] == [AS_ONE_LIST] and images and not (len(images) == 1 and images[0].startswith("[")):
        images = [json.dumps(images)]
    return [*arguments, *images]


def _options(words: Sequence[str]) -> Iterator[list[str]]:
    """Each option with the words that follow it; before the first, the names of the command and what stands there."""
    group: list[str] = []
    for word in words:
        if group and word.startswith("-") and not NUMBER.match(word):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _option(name: str, values: list[str], sign: str) -> list[str]:
    if name in FLAGS and not values:
        values, sign = ["true"], "="
    if name == CONFIG and values:  # it may stand before the command, whose name it does not take
        path, *names = values
        return [*([f"{name}={_config(path)}"] if sign else [name, _config(path)]), *names]
    if len(values) > 1:
        values = [json.dumps(values)]
    return [f"{name}={values[0]}"] if sign else [name, *values]


def _config(given: str) -> str:
    """The path of a config: that of a recipe of this package where ``given`` is its name and no file."""
    if Path(given).suffix or Path(given).name != given or Path(given).exists():
        return given
    found = CONFIGS / f"{given}.yaml"
    if not found.exists():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise InputError(f"--config {given}: no such file, and no recipe that comes with gif; those are {names}")
    return str(found)
