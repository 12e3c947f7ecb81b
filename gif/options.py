"""Settings as options of a command: the fields of a config, which are written down once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints


def options_of(config: type, *, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of the dataclass ``config``, in the place of its parameter ``config``.

    Their types, defaults and help are the dataclass's, for the command line and for Python. The command itself gets
    the dataclass. Fields ``without`` an option keep their default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def flat(*arguments: Any, **options: Any) -> None:
            settings = {name: options.pop(name) for name in fields if name in options}
            command(*arguments, config=config(**settings), **options)

        types = get_type_hints(config)
        fields = {
            name: parameter.replace(annotation=types[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(config).parameters.items()
            if name not in without
        }
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            parameters += fields.values() if name == "config" else [parameter]
        flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        flat.__doc__ = f"{inspect.getdoc(command)}\n{_described(config)}"  # which ends with its arguments
        return flat

    return decorate


def _described(config: type) -> str:
    """What the docstring of ``config`` says of its arguments."""
    return (inspect.getdoc(config) or "").partition("Args:\n")[2].partition("\n\n")[0]
