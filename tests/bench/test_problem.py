"""Shapes from words, and the inputs they stand for."""

import pytest
import torch

from simreg.bench import problem
from simreg.bench.problem import Shape, shapes
from simreg.recipe.errors import UserError

CPU = torch.device("cpu")


def test_sizes_dtypes_and_chunks_are_combined():
    found = shapes(["8x4", "3x16x2"], 32, ["float32", "bfloat16"], [None, 8])
    assert found == [
        Shape(4, 8, 4, "float32"),  # a chunk of 8 is the row: once
        Shape(4, 8, 4, "bfloat16"),
        Shape(3, 16, 2, "float32"),
        Shape(3, 16, 2, "float32", 8),
        Shape(3, 16, 2, "bfloat16"),
        Shape(3, 16, 2, "bfloat16", 8),
    ]
    assert shapes(["64x4"], 32, ["float32"], [None]) == [Shape(1, 64, 4, "float32")]


@pytest.mark.parametrize("size", ["", "8", "8x", "x8", "8x0", "0x8x8", "1x2x3x4", "8X4", "-8x4"])
def test_other_words_are_no_sizes(size):
    with pytest.raises(UserError, match="LENGTHxDIM"):
        shapes([size], 32, ["float32"], [None])


@pytest.mark.parametrize(
    ("chunk", "message"),
    [(3, "3 does not divide the length 8"), (5, "5 does not"), (-1, "or 2 or more, got -1")],
)
def test_chunks_must_divide_the_row(chunk, message):
    with pytest.raises(UserError, match=message):
        shapes(["8x4"], 32, ["float32"], [chunk])


def test_the_shapes_of_large_models_are_measured_on_cuda():
    sizes, tokens, dtype = problem.default_sizes(torch.device("cuda"))
    found = shapes(sizes, tokens, [dtype], [None])
    assert {(2048, 768), (4096, 2048), (8192, 4096)} <= {(s.length, s.dim) for s in found}
    assert {s.batch * s.length for s in found} == {65_536}
    assert dtype == "bfloat16"


def test_bytes_and_rows():
    shape = Shape(batch=2, length=64, dim=8, dtype="bfloat16", chunk=16)
    assert (shape.hidden_bytes, shape.rows, shape.row) == (2 * 64 * 8 * 2, 8, 16)
    assert str(shape) == "batch 2, L 64, chunks of 16, d 8, bfloat16"


@pytest.mark.parametrize("dtype", problem.DTYPES)
def test_inputs_are_the_same_each_time_and_labels_long_tailed(dtype):
    shape = Shape(batch=4, length=2048, dim=2, dtype=dtype)
    hidden, labels = problem.inputs(shape, CPU)
    again = problem.inputs(shape, CPU)
    assert torch.equal(hidden, again[0])
    assert torch.equal(labels, again[1])
    assert hidden.is_leaf
    assert hidden.requires_grad
    assert hidden.dtype == getattr(torch, dtype)
    counts = labels.flatten().bincount()
    assert counts.argmax() == 0
    assert 0.06 < counts[0] / labels.numel() < 0.12  # 1 / Σ 1/rank = 9 %
    assert (counts == 1).sum() > 500


def test_chunks_become_rows():
    hidden, labels = torch.arange(24.0).view(2, 6, 2), torch.arange(12).view(2, 6)
    h, y = problem.rows(hidden, labels, Shape(2, 6, 2, "float32", 3))
    assert y.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert torch.equal(h[1], hidden[0, 3:])
