"""Finds the markers of a page and puts the tables between them."""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simreg.recipe.errors import UserError
from simreg.study.tables.kinds import KINDS
from simreg.study.tables.request import Request, Source

_OPENING = re.compile(r"<!--\s*table:(.*)-->\s*")
_CLOSING = re.compile(r"<!--\s*/table\s*-->\s*")
_RESEMBLES = re.compile(r"<!--\s*/?\s*tables?\b")


@dataclass(frozen=True)
class Page:
    """A page with its tables drawn, and the markers (`FILE:LINE: ...`) below which it changed."""

    text: str
    stale: list[str]


def redraw(path: Path) -> Page:
    """The page as it should be; UserError, in one line, for a marker that cannot be followed."""
    try:
        page = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    newline = "\r\n" if "\r\n" in page else "\n"
    root, kept, stale = _root(path), list[str](), list[str]()
    rest = iter(enumerate(page.split(newline), 1))
    for number, line in rest:
        where = f"{path}:{number}"
        kept.append(line)
        if opening := _OPENING.fullmatch(line):
            old, end = _until_closed(rest, where)
            new = ["", *_table(opening[1], root, where).splitlines(), ""]
            kept += [*new, end]
            if old != new:
                stale.append(f"{where}: table {opening[1].strip()}")
        elif _RESEMBLES.match(line):
            raise UserError(
                f"{where}: expected `<!-- table: KIND PATH ... -->`, or `<!-- /table -->` after "
                "it, alone on the line"
            )
    return Page(newline.join(kept), stale)


def _until_closed(rest: Iterable[tuple[int, str]], where: str) -> tuple[list[str], str]:
    """The lines up to the end marker, and the end marker."""
    inside: list[str] = []
    for _, line in rest:
        if _CLOSING.fullmatch(line):
            return inside, line
        if _RESEMBLES.match(line):
            break
        inside.append(line)
    raise UserError(f"{where}: no `<!-- /table -->` before the next marker or the end of the file")


def _table(marker: str, root: Path, where: str) -> str:
    try:
        return draw(marker, root)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def draw(marker: str, root: Path) -> str:
    """The table that `KIND PATH [PATH...] [key=value ...]` asks for, as Markdown."""
    try:
        name, *words = shlex.split(marker)
    except ValueError as error:
        raise UserError(f"cannot read the marker: {error}") from None
    if name not in KINDS:
        raise UserError(f"unknown kind {name!r}: one of {', '.join(KINDS)}")
    kind = KINDS[name]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if unknown := sorted(options.keys() - set(kind.options)):
        allowed = ", ".join(kind.options) or "none"
        raise UserError(f"{name} has no option {unknown[0]!r} (options: {allowed})")
    paths = [word for word in words if "=" not in word]
    if not paths or (len(paths) > 1 and not kind.several):
        raise UserError(f"{name} takes {'' if kind.several else 'one of '}the paths of JSON files")
    sources = [Source(path, root / path, _read(root / path, path, kind.needs)) for path in paths]
    return kind.draw(Request(sources, options))


def _read(path: Path, name: str, needs: Iterable[str]) -> dict[str, Any]:
    """A JSON file that has the keys needed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name}: {error}") from None
    keys = content if isinstance(content, dict) else {}
    if lacking := [key for key in needs if key not in keys]:
        raise UserError(f"{name} is not what this kind is drawn from: it lacks {lacking[0]!r}")
    return keys


def _root(page: Path) -> Path:
    """The folder that paths are relative to: that of the checkout, else the page's own."""
    folder = page.resolve().parent
    above = (folder, *folder.parents)
    return next((each for each in above if (each / "pyproject.toml").is_file()), folder)
