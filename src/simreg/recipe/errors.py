"""What the user can fix: the command line prints the message in one line and exits with 2."""

import difflib
import errno
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:  # the command starts without it, to say what is missing
    from pydantic import ValidationError


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a full disk or quota."""


def to_install(extra: str) -> str:
    """What brings an extra of this package, from the checkout that it runs from or without one."""
    if (Path(__file__).parents[3] / "pyproject.toml").exists():
        return f"pip install -e '.[{extra}]' in the checkout"
    return f"install simreg with its extra {extra!r}"


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""


class Locked(UserError):
    """Another process is training in the folder."""


class Diverged(UserError):
    """Loss, gradient or weights became NaN or infinite."""


def describe(error: "ValidationError", root: Any, prefix: str = "") -> str:
    """Pydantic's findings about a `root` in one line: `optim.lr: Input should be … (got -1)`."""
    return "; ".join(_finding(item, root, prefix) for item in error.errors())


def _finding(item: Any, root: Any, prefix: str) -> str:
    if item["type"] == "value_error":  # our own check, whose text says it all
        return str(item["ctx"]["error"])
    where = prefix + (".".join(map(str, item["loc"])) or "config")
    if item["type"] == "unexpected_keyword_argument":
        return f"{where}: there is no such field{_meant(root, prefix, *map(str, item['loc']))}"
    return f"{where}: {item['msg']} (got {item['input']!r})"


def _meant(root: Any, prefix: str, *path: str) -> str:
    """What a field may have been meant to be: one of its section, or one elsewhere in `root`."""
    *above, name = path
    section = root
    for part in above:
        section = get_type_hints(section).get(part)
    if not is_dataclass(section):
        return ""
    own = {each.name: ".".join([*above, each.name]) for each in fields(section)}
    for known in (own, dict(_leaves(root))):
        for near in difflib.get_close_matches(name, known, 1):
            return f"; did you mean {prefix}{known[near]}?"
    return f" (there are {', '.join(own)})"


def _leaves(root: Any) -> Iterator[tuple[str, str]]:
    """Fields of a config and its sections: name, and path from the root."""
    for name, kind in get_type_hints(root).items():
        yield name, name
        if is_dataclass(kind):
            yield from ((leaf, f"{name}.{path}") for leaf, path in _leaves(kind))
