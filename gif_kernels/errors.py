"""The one exception of both packages for what the person who called can mend."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """An argument, setting or file is not what was wanted: the message says what was given, wanted, and what to do.

    The `gif` command prints it in one line. Any other exception that reaches the command is a bug, and shown as one.
    """
