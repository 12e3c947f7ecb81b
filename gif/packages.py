"""Packages that one part of this project needs and the others do without: imported where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gif.errors import UnavailableError

OWN = "gif-recognition"


@contextmanager
def needs(package: str, purpose: str) -> Iterator[None]:
    """Around the imports of ``package``, as pip calls it; UnavailableError, with how to install it, without it.

    ``purpose`` is what cannot be done then: "pictures", "reading images".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        whole = "" if "[" in package.partition(OWN)[2] else f", or all that training needs: pip install '{OWN}[train]'"
        raise UnavailableError(
            f"{purpose}: the package {package} is needed and not installed ({error}); pip install {package!r}{whole}"
        ) from error
