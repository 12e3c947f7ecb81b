"""The `gif` command: each stage of the method, and all of them at once."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from gif.codes.commands import export_codes, extend_codes, inspect_codes, tokenize_command
from gif.data.convert import convert
from gif.data.glyphs.report import glyph_report
from gif.data.inspection import inspect
from gif.doctor import doctor
from gif.errors import InputError, Interrupted
from gif.evaluation.command import evaluate
from gif.experiments.accuracy import accuracy
from gif.experiments.quickstart import quickstart
from gif.experiments.sweep import sweep
from gif.export import export_command
from gif.faults import BUG_CODE, MENDABLE_CODE, bug, mendable, printable
from gif.packages import needs
from gif.planning import plan
from gif.progress import say
from gif.training.command import train_command
from gif.vectors.commands import spread_command, vectors_command

DEBUG = "--debug"
DESCRIPTION = (
    "Train recognition models with millions of identities: identity codes instead of a softmax. "
    f"{DEBUG}, anywhere in a command, shows where an error comes from."
)
ALIASES = {"--closed_form": "--start"}  # which torchrun takes for a short form of its own --start-method


COMMANDS: dict[str, Any] = {
    "quickstart": quickstart,
    "data": {
        "_help": "Say what is in a data set, convert it, render glyphs.",
        "inspect": inspect,
        "convert": convert,
        "glyphs": glyph_report,
    },
    "vectors": vectors_command,
    "spread": spread_command,
    "plan": plan,
    "tokenize": tokenize_command,
    "codes": {
        "_help": "Look into identity codes, export them, and give codes to identities that come later.",
        "inspect": inspect_codes,
        "export": export_codes,
        "extend": extend_codes,
    },
    "train": train_command,
    "evaluate": evaluate,
    "export": export_command,
    "accuracy": accuracy,
    "sweep": sweep,
    "doctor": doctor,
}


def _run(arguments: Sequence[str]) -> None:
    """The command line, by jsonargparse, which it alone needs."""
    with needs("jsonargparse[signatures]", "the command line"):
        from jsonargparse import ArgumentParser, auto_cli

    class Parser(ArgumentParser):
        """Names what is missing as it is given on the command line: --output, not train.output."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            begin, required, keys = message.partition("arguments are required: ")
            if required:
                message = begin + required + ", ".join(map(_option, keys.split(", ")))
            super().error(message, ex)

        def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return super().parse_path(cfg_path, *arguments, **options)
            except UnicodeDecodeError as error:
                raise InputError(f"{cfg_path} is no UTF-8 text ({error}); write the config as UTF-8") from error

    auto_cli(
        COMMANDS,
        args=_arguments(arguments),
        as_positional=False,
        prog="gif",
        description=DESCRIPTION,
        parser_class=Parser,
    )


def _option(key: str) -> str:
    """--option of a key such as train.output or data.convert.input."""
    level: Any = COMMANDS
    names = key.split(".")
    while len(names) > 1 and isinstance(level, dict) and names[0] in level:
        level = level[names.pop(0)]
    return f"--{'.'.join(names)}"


def _arguments(given: Sequence[str]) -> list[str]:
    """The command line with options by their first names, and without --debug, which may stand anywhere."""
    arguments = []
    for argument in given:
        name, sign, value = argument.partition("=")
        arguments.append(f"{ALIASES.get(name, name)}{sign}{value}")
    return [argument for argument in arguments if argument != DEBUG]


def main() -> None:
    """Run the `gif` command.

    What a user can mend is one line, and exits with 1; a wrong command line with 2; an interrupt with 130, SIGTERM,
    which is one too, with 143: what long work keeps is kept. Anything else is a bug, said to be one, and exits with 70.
    --debug shows the traceback in each case.
    """
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a bus error, of a mapped file that was shortened, says where it was read
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    given = sys.argv[1:]
    try:
        _run(given)
    except KeyboardInterrupt as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            say(str(stop) or "interrupted; this command keeps nothing, and begins anew")
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    except Exception as error:
        if DEBUG in given:
            traceback.print_exc()
        line = mendable(error)
        say(printable(bug(error) if line is None else f"error: {line}"))
        sys.exit(BUG_CODE if line is None else MENDABLE_CODE)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Interrupted("", number)


if __name__ == "__main__":
    main()
