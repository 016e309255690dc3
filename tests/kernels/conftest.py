"""Triton's interpreter in two thirds of its time: it replaces its language anew at each call of a
function within a kernel, where it has been replaced already."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.problems import TRITON


@pytest.fixture(autouse=True, scope="session")
def _replaced_once():
    if not TRITON:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    scope = getattr(interpreter, "_LangPatchScope", None)  # not in all versions

    def replace_once(kernel: Callable[..., Any]) -> Any:
        here = [value for value in kernel.__globals__.values() if value is tl or value is tl.core]
        done = all(inspect.isfunction(language.static_range) for language in here)
        return scope() if scope and done else replace(kernel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield
