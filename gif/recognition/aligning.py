"""The hook that brings faces into their place, by the name that the command line gives it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

from gif.data.decoding import Align
from gif.errors import InputError, MissingFileError, in_short


def load_align(name: str) -> Align:
    """The function that ``name`` is of: "file.py:function", or "package.module:function" of what is installed.

    Raises ValueError where there is none, or what it is in cannot be imported.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise InputError(f"align is {name!r}; give file.py:function, or package.module:function")
    found = getattr(_module(place), function, None)
    if not callable(found):
        raise InputError(f"{place} has no function {function}; give --align {place}:FUNCTION")
    return cast(Align, found)


def _module(place: str) -> ModuleType:
    path = Path(place)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        if not path.is_file():
            raise MissingFileError(f"no file {place}; give --align file.py:function")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # where a worker that is spawned looks for the function
        spec.loader.exec_module(module)
    except MissingFileError:
        raise
    except Exception as error:  # it is another's code
        raise InputError(f"{place} cannot be imported ({type(error).__name__}: {in_short(error)})") from error
    return module
