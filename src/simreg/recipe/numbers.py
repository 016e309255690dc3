"""Numbers in configs and on command lines, and what help says of defaults."""

import contextlib
import re
from typing import Annotated, Any

import tyro
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _not_bool(value: Any) -> Any:
    """YAML's yes and no are none, though pydantic would take them for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


Number = Annotated[float, BeforeValidator(_not_bool)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Depth = Annotated[Number, Field(gt=0, lt=1)]


def _whole(value: Any) -> Any:
    """1e6, a word to YAML, is a number."""
    value = _not_bool(value)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d{1,2}", value):
        return float(value)
    return value


def _from_word(words: list[str]) -> int:
    value = _whole(words[0])
    with contextlib.suppress(ValueError):
        if not isinstance(value, float) or value.is_integer():
            return int(value)
    raise ValueError(f"{words[0]} is not a whole number (1e6 and 2_000 are)")


Whole = Annotated[
    int,
    BeforeValidator(_whole),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_from_word,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""An integer, in a file or on the command line, that may be written as 1e6."""


def _each(value: Any) -> Any:
    """One number, also for a list of equal ones, so that what is the same is written alike."""
    numbers = [_whole(each) for each in (value if isinstance(value, list) else [value])]
    numbers = [int(n) if isinstance(n, float) and n.is_integer() else n for n in numbers]
    if not numbers or any(type(each) is not int for each in numbers):
        raise PydanticCustomError("offsets", "Input should be a whole number or a list of them")
    return numbers[0] if len(set(numbers)) == 1 else numbers


Offsets = Annotated[
    int | list[int],
    BeforeValidator(_each),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT [INT ...]",
        instance_from_str=lambda words: _each([_from_word([word]) for word in words]),
        is_instance=lambda value: isinstance(value, int | list),
        str_from_instance=lambda value: (
            [str(value)] if isinstance(value, int) else [str(each) for each in value]
        ),
    ),
]
"""One for all, or a list of one for each."""

Count = Annotated[Whole, Field(gt=0, le=2**53)]


def default_of(text: str) -> Any:
    """What a flag's help says of its default, where that is not the field's None or []."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")
