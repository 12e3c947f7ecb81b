"""The `gif` command: each stage of the method, and all of them at once."""

from __future__ import annotations

import ast
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gif import __version__
from gif.arguments import BY_THEMSELVES, DEBUG, parsed
from gif.errors import InputError, Interrupted
from gif.faults import BUG_CODE, MENDABLE_CODE, bug, mendable, printable
from gif.packages import needs
from gif.progress import say
from gif.settings import section_of

DESCRIPTION = (
    "Train recognition models with millions of identities: identity codes instead of a softmax. "
    f"{DEBUG}, anywhere in a command, shows where an error comes from."
)
HELP = "_help"
"""The key of what a group of commands is for, as jsonargparse has it."""
INTERRUPT_AGAIN = 0.05  # seconds after it was dropped
IMAGES = "images"

COMMANDS: dict[str, Any] = {
    "run": "gif.run.command:run_command",
    "quickstart": "gif.experiments.quickstart:quickstart",
    "data": {
        "_help": "Say what is in a data set, convert it, render glyphs.",
        "inspect": "gif.data.inspection:inspect",
        "convert": "gif.data.convert:convert",
        "glyphs": "gif.data.glyphs.report:glyph_report",
    },
    "vectors": "gif.vectors.commands:vectors_command",
    "spread": "gif.vectors.commands:spread_command",
    "plan": "gif.planning.command:plan",
    "tokenize": "gif.codes.commands:tokenize_command",
    "codes": {
        "_help": "Look into identity codes, export them, and give codes to identities that come later.",
        "inspect": "gif.codes.commands:inspect_codes",
        "export": "gif.codes.commands:export_codes",
        "extend": "gif.codes.commands:extend_codes",
        "grow": "gif.codes.commands:grow_codes",
    },
    "train": "gif.training.command:train_command",
    "evaluate": "gif.evaluation.command:evaluate",
    "embed": "gif.recognition.commands:embed_command",
    "verify": "gif.recognition.commands:verify_command",
    "search": "gif.recognition.commands:search_command",
    "export": "gif.export:export_command",
    "hub": "gif.hub:export_to_hub",
    "accuracy": "gif.experiments.accuracy:accuracy",
    "sweep": "gif.experiments.sweep:sweep",
    "experiments": {
        "_help": "Repeat the experiments of the paper's supplement, each with a quick form (docs/paper.md).",
        "forces": "gif.experiments.paper.forces:forces",
        "lambda": "gif.experiments.paper.token_lambda:token_lambda",
        "cost": "gif.experiments.paper.cost:cost",
        "encoders": "gif.experiments.paper.encoders:encoders",
    },
    "doctor": "gif.doctor:doctor",
}
"""Each command as "module:function", where the function is defined: of a command line, only its own is imported."""


def _components(arguments: Sequence[str]) -> dict[str, Any]:
    """Of `COMMANDS` what ``arguments`` need: the command that they begin with; else what each is for."""
    level: Any = COMMANDS
    path: list[str] = []
    for word in arguments:
        if not isinstance(level, dict) or word not in level or word == HELP:
            break
        path.append(word)
        level = level[word]
    if isinstance(level, str):
        return _only(COMMANDS, path)
    asked_for_more = bool(arguments) and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")
    return _each(COMMANDS, _function if asked_for_more else _description)


def _only(level: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """``level`` with nothing but the command at ``path``."""
    first, *rest = path
    kept = _only(level[first], rest) if rest else _function(level[first])
    return {**{key: text for key, text in level.items() if key == HELP}, first: kept}


def _each(level: Mapping[str, Any], make: Callable[[str], Any]) -> dict[str, Any]:
    """``level`` with what ``make`` makes of every command."""
    return {
        key: value if key == HELP else _each(value, make) if isinstance(value, dict) else make(value)
        for key, value in level.items()
    }


def _function(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _description(target: str) -> Callable[[], None]:
    """A function with the docstring of ``target`` and nothing else, read without importing what it needs."""
    module, name = target.split(":")
    source = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    body = ast.parse(source.read_text(encoding="utf-8")).body
    (definition,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)

    def described() -> None: ...

    described.__doc__ = ast.get_docstring(definition)
    return described


def _run(arguments: Sequence[str]) -> None:
    """The command line, by jsonargparse, which it alone needs."""
    with needs("jsonargparse[signatures]", "the command line"):
        from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings
    if "add_print_completion_argument" in signature(set_parsing_settings).parameters:
        set_parsing_settings(add_print_completion_argument=True)

    class Parser(ArgumentParser):
        """Names what is missing as it is given on the command line: --output, not train.output."""

        def add_function_arguments(self, function: Any, *arguments: Any, **options: Any) -> Any:
            if function.__name__ in BY_THEMSELVES.values():
                options["as_positional"] = True
            added = super().add_function_arguments(function, *arguments, **options)
            for action in self._actions:
                if action.dest == IMAGES:
                    action.metavar = "IMAGE ..."
            return added

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            begin, required, keys = message.partition("arguments are required: ")
            if required:
                message = begin + required + ", ".join(map(_option, keys.split(", ")))
            super().error(message, ex)

        def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Any:
            path = Path(cfg_path)
            command = " ".join(word for word in self.prog.split()[1:] if not word.startswith("["))  # [options] between
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{cfg_path} is no UTF-8 text ({error}); write the config as UTF-8") from error
            own = section_of(path, text, command, COMMANDS)
            if own is not text:
                return self.parse_string(own, *arguments, **options)
            return super().parse_path(cfg_path, *arguments, **options)

    arguments = parsed(arguments)
    auto_cli(
        _components(arguments),
        args=arguments,
        as_positional=False,
        prog="gif",
        description=DESCRIPTION,
        parser_class=Parser,
        version=__version__,
    )


def _option(key: str) -> str:
    """--option of a key such as train.output or data.convert.input; of what stands by itself its name alone."""
    level: Any = COMMANDS
    names = key.split(".")
    while len(names) > 1 and isinstance(level, dict) and names[0] in level:
        level = level[names.pop(0)]
    by_itself = _is_by_itself(level) and _is_positional(_function(level), names[0])
    return names[0].upper() if by_itself else f"--{'.'.join(names)}"


def _is_by_itself(target: Any) -> bool:
    """Whether it is a command whose images stand by themselves."""
    return isinstance(target, str) and target.partition(":")[2] in BY_THEMSELVES.values()


def _is_positional(command: Callable[..., Any], name: str) -> bool:
    """Whether a parameter of such a command is given by its place."""
    return signature(command).parameters[name].kind is Parameter.POSITIONAL_OR_KEYWORD


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
        if sys.unraisablehook is sys.__unraisablehook__:  # nobody has one of their own
            sys.unraisablehook = _interrupt_again
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


def _interrupt_again(ignored: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor or a callback: an interrupt that came there comes again."""
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        number = getattr(ignored.exc_value, "number", signal.SIGINT)
        again = threading.Timer(INTERRUPT_AGAIN, os.kill, [os.getpid(), number])
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(ignored)


if __name__ == "__main__":
    main()
