"""Nested plain values: read from YAML and from the words of a command line, laid over others."""

from pathlib import Path
from typing import Any

import yaml

from simreg.recipe.errors import UserError


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, section by section; neither is changed.

    Options of an auxiliary loss give way to those of another one.
    """
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if key == "auxiliary" and _other_name(old, value):
                old = {}
            value = merge(old, value)
        merged[key] = value
    return merged


def _other_name(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "name" in new and old.get("name") not in (None, new["name"])


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, with unique keys; what is merged in (`<<`) may be said anew."""
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key, where in zip(keys, own, strict=True):
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r} twice", problem_mark=where.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain values; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping (an empty file is an empty one)."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        named = Path(path).suffix.lower() in (".yaml", ".yml")
        text = "" if named else " (it was taken for settings; text is named by data.source)"
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not valid YAML{text}: {why}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def parse_assignments(text: str, flag: str) -> dict[str, Any]:
    """`section.key=value,...` as nested overrides; values are read as YAML."""
    nested: dict[str, Any] = {}
    for item in _split(text):
        path, equals, value = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"{flag}: {item!r} is not of the form section.key=value")
        try:
            leaf = parse_yaml(value)
        except yaml.YAMLError:
            raise UserError(f"{flag}: cannot read the value of {item!r}") from None
        for key in reversed(keys):
            leaf = {key: leaf}
        nested = merge(nested, leaf)
    return nested


def _split(text: str) -> list[str]:
    """The parts between commas, apart from commas inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1][-1:] in set("=[{, "):  # where a value begins
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
