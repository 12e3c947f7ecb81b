"""Config files: settings of one command, or of several, each under its command's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gif.errors import InputError
from gif.files import existing_file, write_text
from gif.packages import needs

Sections = dict[str, dict[str, Any]]


def sections(text: str, commands: Mapping[str, Any]) -> Sections | None:
    """The settings of each command that a config's ``text`` has; None where it holds those of one command alone.

    ``commands`` are the names that a section may have. Text that is no YAML holds no sections: its reader says why.
    """
    with needs("pyyaml", "config files"):
        import yaml
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(found, dict) or not found:
        return None
    if not all(name in commands and isinstance(settings, dict) for name, settings in found.items()):
        return None
    return found


def section_of(path: Path, text: str, command: str, commands: Mapping[str, Any]) -> str:
    """What the config at ``path``, which holds ``text``, says for ``command``: its section, or all of it.

    Raises ValueError where it has sections for other commands alone.
    """
    found = sections(text, commands)
    if found is None:
        return text
    if command not in found:
        raise InputError(f"{path} holds settings for {', '.join(found)}, and none for {command}; give another --config")
    return json.dumps(found[command])


def write_sections(path: Path, settings: Sections, notes: Mapping[str, str], title: str) -> None:
    """Write settings by command as YAML, atomically, the lines of ``title`` and of ``notes`` as comments above."""
    with needs("pyyaml", "config files"):
        import yaml
    lines = [*title.splitlines(), *(f"{what}: {why}" for what, why in notes.items())]
    text = "".join(f"# {line}\n" for line in lines)
    write_text(path, text + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120))


def read_sections(path: Path, wanted: Sequence[str] = ()) -> Sections:
    """What `write_sections` wrote, or a person changed in it.

    Raises ValueError where it is no longer in sections, or one that is ``wanted`` is not among them.
    """
    with needs("pyyaml", "config files"):
        import yaml
    try:
        found = yaml.safe_load(existing_file(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no YAML ({error}); mend it, or remove it to have the settings chosen anew"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise InputError(f"{path} holds no settings by command; mend it, or remove it to have them chosen anew")
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{path} has no settings for {', '.join(missing)}; mend it, or remove it to choose anew")
    return found


def check(command: Callable[..., None], settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a command would not take ``settings``, which ``where`` has; they are read as by `call`."""
    _parsed(command, settings, where, only=True)


def call(command: Callable[..., None], settings: Mapping[str, Any], where: str) -> None:
    """Call a command with ``settings``, read as its --config is: types, checks and defaults are the command line's."""
    _parsed(command, settings, where, only=False)


def _parsed(command: Callable[..., None], settings: Mapping[str, Any], where: str, *, only: bool) -> None:
    with needs("jsonargparse[signatures]", "the command line"):
        from jsonargparse import ArgumentParser, auto_cli, auto_parser

    class Parser(ArgumentParser):
        """One that raises, where the command line prints its usage and ends."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InputError(f"{where}: {message}; mend it there") from ex

    given = ["--config", json.dumps(settings)]
    if only:
        auto_parser(command, as_positional=False, parser_class=Parser).parse_args(given)
    else:
        auto_cli(command, args=given, as_positional=False, parser_class=Parser)
