"""Problems and small tiles for the tests of the kernels."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.fuzz import small_blocks
from simreg.kernels import blockwise
from simreg.loss import VARIANTS

TRITON = importlib.util.find_spec("triton") is not None
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def problem(batch, length, dim, classes, segments=0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (batch, length), generator=generator)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, -100)
    ids = torch.randint(0, segments, labels.shape, generator=generator) if segments else None
    return hidden, labels, ids


@contextmanager
def small_tiles(backend: str, blocks: Any = None, **limits: int) -> Iterator[None]:
    """Tiles of 16 tokens, for triton `blocks`; `limits` replace byte limits of its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "blockwise":
            patch.setattr(blockwise, "block", lambda device: 16)
        elif TRITON:
            from simreg.kernels import triton

            patch.setattr(triton, "blocks", lambda *_: blocks or small_blocks(0))
            for name, value in limits.items():
                patch.setattr(triton, name, value)
        yield


each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
each_backend = pytest.mark.parametrize(
    "backend", ["blockwise", "reference", pytest.param("triton", marks=needs_triton)]
)
# The interpreter computes with numpy, which warns of the logarithm of 0 that stands for "none".
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
