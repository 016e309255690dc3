"""FLOPs of matrix products while something runs, and what to run."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simreg.bench.problem import Shape, inputs


def counted(run: Callable[[], object]) -> int:
    """FLOPs of all products, two for a multiply-add, as torch counts them."""
    mode = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _added})
    with mode as counter:
        run()
    return counter.get_total_flops()


def _added(into, left, right, *, out_shape=None, **scales) -> int:
    """Of `baddbmm_`, since torch knows only the form that is not in place."""
    return 2 * left[0] * left[1] * left[2] * right[2]


def problem(batch: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Random hidden states and labels with the frequencies of text."""
    return inputs(Shape(batch, length, dim, "float32"), torch.device("cpu"))


def fixed_spans(stops: list[int], size: int) -> list[slice]:
    """For `blockwise._spans`: wherever segments end, as Triton has tiles, and the formulas."""
    return [slice(i, min(i + size, stops[-1])) for i in range(0, stops[-1], size)]
