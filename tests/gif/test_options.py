"""A config's fields as options of a command."""

import inspect
from dataclasses import dataclass
from typing import Literal

import pytest

from gif.options import options_of


@dataclass(frozen=True)
class Config:
    """How.

    Args:
        speed: how fast,
            in rows a second.
        mode: which way.
        hidden: not for everybody.

    Raises nothing.
    """

    speed: float = 2.0
    mode: Literal["up", "down"] = "up"
    hidden: int = 5


def command(table: str, *, config: Config, device: str = "cpu") -> None:
    """Do it.

    Args:
        table: what.
        device: where.
    """
    CALLS.append((table, config, device))


CALLS: list[tuple[str, Config, str]] = []


def test_signature_and_docstring_are_the_configs():
    flat = options_of(Config, without=("hidden",))(command)
    parameters = inspect.signature(flat).parameters
    assert list(parameters) == ["table", "speed", "mode", "device"]
    assert parameters["speed"].annotation is float and parameters["speed"].default == 2.0
    assert parameters["mode"].annotation == Literal["up", "down"]
    assert parameters["table"].default is inspect.Parameter.empty
    assert "speed: how fast,\n        in rows a second." in flat.__doc__ and "Raises" not in flat.__doc__
    assert flat.__name__ == "command"


def test_the_command_gets_the_config():
    flat = options_of(Config, without=("hidden",))(command)
    flat("t", speed=3.0, device="cuda")
    assert CALLS.pop() == ("t", Config(speed=3.0), "cuda")
    flat("t")
    assert CALLS.pop() == ("t", Config(), "cpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'hidden'"):
        flat("t", hidden=3)
