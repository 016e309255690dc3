"""What the user can fix: the command line prints the message in one line and exits with 2."""

import difflib
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:  # not needed for the loss
    from pydantic import ValidationError


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
    where = ".".join(map(str, item["loc"])) or "config"
    if item["type"] == "unexpected_keyword_argument":
        return f"{prefix}{where}: there is no such field{_meant(root, *map(str, item['loc']))}"
    return f"{prefix}{where}: {item['msg']} (got {item['input']!r})"


def _meant(root: Any, *path: str) -> str:
    """What a field may have been meant to be: one of a like name, or one of a section's."""
    *above, name = path
    for section in above:
        root = get_type_hints(root).get(section)
    if not is_dataclass(root):
        return ""
    names = {each.name: each.name for each in fields(root)}
    for section, kind in get_type_hints(root).items():
        if is_dataclass(kind):
            names |= {each.name: f"{section}.{each.name}" for each in fields(kind)} | names
    for near in difflib.get_close_matches(name, names, 1):
        return f"; did you mean {'.'.join([*above, names[near]])}?"
    return f" (there are {', '.join(names)})"
