"""What blockwise promises beyond being right: tiles, memory, precision."""

import pytest
import torch

from benchmarks import fuzz
from simreg.bench.contenders import contenders
from simreg.bench.memory import peak_extra_bytes
from simreg.bench.problem import Shape
from simreg.kernels import blockwise as module
from simreg.kernels import op
from simreg.kernels.order import Form
from simreg.loss import simreg_loss
from tests.kernels.problems import each_variant, problem, small_tiles
from tests.test_loss import per_token, value_and_grad


@each_variant
@pytest.mark.parametrize("segments", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 64, 129])
@pytest.mark.parametrize("classes", [1, 7, 10**6])
def test_many_tiles_equal_the_reference(variant, length, classes, segments):
    hidden, labels, ids = problem(3, length, 5, classes, segments)
    options = {"variant": variant, "segments": ids}
    truth = value_and_grad(per_token, hidden, labels, backend="reference", **options)
    with small_tiles("blockwise"):
        ours = value_and_grad(per_token, hidden, labels, backend="blockwise", **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("length", [127, 1100])
def test_as_accurate_as_the_naive_loss(variant, dtype, temperature, length):
    hidden, labels, _ = problem(1, length, 65, 40, dtype=dtype)
    options = {"variant": variant, "temperature": temperature}
    truth = value_and_grad(per_token, hidden.double(), labels, backend="reference", **options)
    naive = value_and_grad(per_token, hidden, labels, backend="reference", **options)
    ours = value_and_grad(per_token, hidden, labels, backend="blockwise", **options)
    for value, plain, exact in zip(ours, naive, truth, strict=True):
        error, allowed = (value - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()


def visited(size, labels, segments=None, masks=torch.bool):
    order = module.describe(module.sort_tokens(labels, segments), labels, segments)
    return list(module.tiles(order, size, masks))


def test_tiles_outside_a_segment_are_not_visited():
    length, documents, block = 256, 8, 16
    labels = torch.randint(0, 50, (1, length))
    contiguous = (torch.arange(length) * documents // length)[None]
    scattered = contiguous[:, torch.randperm(length)]

    whole = visited(block, labels)
    assert len(whole) == 16 * 17 // 2
    for ids in (contiguous, scattered):  # 8 documents of 2 blocks: 3 tiles each
        assert len(visited(block, labels, ids)) == documents * 3
    short = labels.masked_fill(torch.arange(length) >= 64, -100)
    assert len(visited(block, short)) == 4 * 5 // 2
    covered = torch.zeros(length, length, dtype=torch.int64)
    for tile in whole:
        covered[tile.rows, tile.cols] += 1
        if tile.rows != tile.cols:
            covered[tile.cols, tile.rows] += 1
    assert (covered == 1).all()


def test_a_tile_ends_where_its_segment_does():
    position, labels = torch.arange(1000)[None], torch.randint(0, 50, (1, 1000))
    tiles = visited(64, labels, position // 40)  # chunks of 40, a tile each, which needs no mask
    assert [(tile.rows, tile.inside) for tile in tiles] == [
        (slice(i, i + 40), None) for i in range(0, 1000, 40)
    ]
    tiles = visited(64, labels, position // 10)  # a tile of a quarter of the size holds two
    assert len(tiles) == 50
    assert all(tile.inside is not None for tile in tiles)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0), (0, 1000)])
def test_without_tokens_there_are_no_tiles(shape):
    assert visited(64, torch.zeros(shape, dtype=torch.int64)) == []


def test_short_rows_share_tiles_of_a_quarter_of_the_size():
    labels = torch.randint(0, 9, (40, 50))
    labels[:, 20] = -100
    tiles = visited(64, labels)
    covered = torch.zeros(40, 50, 50, dtype=torch.int64)
    for tile in tiles:
        covered[tile.batch, tile.rows, tile.cols] += 1
        if tile.symmetric:
            covered[tile.batch, tile.cols, tile.rows] += 1
        assert tile.inside is None  # every row has as many labels, sorted first
    assert (covered[:, :49, :49] == 1).all()
    assert covered.sum() == 40 * 49 * 49
    assert len(tiles) == 3 * (4 * 5 // 2)  # 16 rows at a time, in tiles of 16
    labels[7, 3] = -100
    assert all(tile.inside is not None for tile in visited(64, labels))


@each_variant
@pytest.mark.parametrize("masks", [torch.bool, torch.float64])
@pytest.mark.parametrize("segments", [0, 3])
@pytest.mark.parametrize("length", [2, 16, 65])
def test_masks_of_either_kind_do_the_same(monkeypatch, variant, masks, segments, length):
    hidden, labels, ids = problem(3, length, 5, 7, segments)
    options = {"variant": variant, "segments": ids, "push": 2.0, "push_above": 0.1}
    chosen = []

    def kind(*args):
        chosen.append(masks)
        return masks

    def evaluated(backend):
        _, grad = value_and_grad(per_token, hidden, labels, backend=backend, **options)
        results = op.loss(hidden, labels, ids, 0.1, variant, 2.0, 0.1, backend)
        return (*results[:3], grad)  # losses, cosines

    monkeypatch.setattr(module, "_masks", kind)
    with small_tiles("blockwise"):
        ours = evaluated("blockwise")
    passes = 2 if variant == "decoupled" else 1
    assert len(chosen) == 2 * passes + 1  # forward, backward, forward
    for a, b in zip(ours, evaluated("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_where_masks_are_numbers():
    norm, form = torch.ones(2, 3), Form(0.05, "out")
    assert module._masks(form, norm) == torch.float32
    assert module._masks(form, norm.double(), norm) == torch.float64
    for bad in (torch.nan, torch.inf):
        assert module._masks(form, norm, torch.tensor([[0.0, bad]])) == torch.bool
    assert module._masks(Form(0.049, "out"), norm) == torch.bool
    assert module._masks(form, norm[:1, :1].expand(1, 2**24)) == torch.bool


@pytest.mark.parametrize("length", [15, 60])
def test_a_norm_that_float32_cannot_hold_is_no_zero(length):
    """Divided by it a token would have no direction, and a loss like any other."""
    hidden, labels, _ = problem(1, length, 5, 4, dtype=torch.float32)
    token = int((labels[0] >= 0).nonzero()[0])
    hidden[0, token] = 1e30
    with small_tiles("blockwise"):
        assert per_token(hidden, labels, backend="blockwise")[0, token].isnan()


@each_variant
@pytest.mark.parametrize("length", [15, 60])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_loss_of_other_segments_than_that_of_a_nan_is_what_it_was(variant, length, bad):
    hidden, labels, ids = problem(2, length, 5, 4, 2)
    valid = labels >= 0
    token = int((valid[1] & (ids[1] == 1)).nonzero()[0])
    healthy = valid & ((ids == 0) | (torch.arange(2) == 0)[:, None])
    options = {"variant": variant, "segments": ids, "push": 2.0, "push_above": 0.1}
    with small_tiles("blockwise"):
        clean = per_token(hidden, labels, backend="blockwise", **options)
        hidden[1, token] = bad
        found = per_token(hidden, labels, backend="blockwise", **options)
    torch.testing.assert_close(found[healthy], clean[healthy], rtol=1e-9, atol=1e-9)
    assert found[1, token].isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_gradient_of_other_segments_than_that_of_such_a_weight_is_what_it_was(bad):
    hidden, labels, ids = problem(1, 15, 5, 4, 2)
    labels = labels.masked_fill((ids == 1) & (labels >= 0), 9).scatter_(1, torch.tensor([[3]]), 8)
    ids[0, 3] = 1  # a token without positives, whose push is all that is weighed
    weight = torch.rand(labels.shape, dtype=torch.float64)
    push = {"segments": ids, "push": 2.0, "push_above": 0.1, "reduction": "none"}

    def gradient():
        h = hidden.clone().requires_grad_()
        simreg_loss(h, labels, backend="blockwise", **push).backward(weight)
        return h.grad

    clean = gradient()
    weight[0, 3] = bad
    found, healthy = gradient(), (ids == 0) & (labels >= 0)
    torch.testing.assert_close(found[healthy], clean[healthy], rtol=1e-9, atol=1e-9)
    assert not found[0, 3].isfinite().any()


def test_peak_memory_at_long_sequences():
    cpu, shape = torch.device("cpu"), Shape(batch=1, length=16_384, dim=512, dtype="float32")
    loss = next(c for c in contenders(cpu) if c.name == "blockwise")
    peak = peak_extra_bytes(loss, shape, cpu)  # the naive loss needs over 4 GiB
    assert peak >= 4 * shape.length * shape.dim  # at least the gradient: the watch does see memory
    assert peak < 400 * 2**20


def test_a_quarter_of_the_fuzzed_problems_are_several_tiles_with_mixed_up_segments(monkeypatch):
    monkeypatch.setattr(fuzz, "clear_of_pairs", lambda hidden: 0.5)  # which takes most of the time
    several = 0
    for seed in range(300):
        problem = fuzz.random_problem(seed, fuzz.SMALL)
        length = min(problem.labels.shape[1], problem.chunk_size or problem.labels.shape[1])
        kept = problem.labels[:, :length] >= 0
        mixed = problem.segments is not None and (problem.segments[:, :length].unique().numel() > 1)
        several += mixed and int(kept.sum(1).max()) > fuzz.SMALL
    assert several >= 300 / 4


def test_fuzzing_holds_an_error_against_the_worst_order_of_the_dimensions():
    problem = fuzz.random_problem(14, fuzz.SMALL)
    truth = fuzz.evaluate(problem, "reference", torch.float64)
    for order in range(1, fuzz.ORDERS):
        again = fuzz.evaluate(problem, "reference", torch.float64, order)
        assert not torch.equal(again[3], truth[3])  # summed in another order
        for a, b in zip(again, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    errors = [torch.tensor([0.0, error]) for error in (3.0, -6.0, 1.0)]
    assert fuzz.ratio(errors[0], tuple(errors), torch.zeros(2), 6.0) == 0.25
