"""Layouts, memory, traffic and shares, against figures worked out by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.fuzz import small_blocks
from simreg.kernels import triton
from simreg.kernels.order import Form
from simreg.plan import costs
from simreg.plan.costs import MIB, Job, Setting
from simreg.plan.models import Model, find

L8B = find("llama-8b")
SMALL = Model("small", hidden=64, layers=3, parameters=9000, multiplied=8000, keys=16)


def test_one_gpu() -> None:
    job = Job(L8B, length=8192, rows=2)
    pairs, d, tokens = 8192 * 8192, 4096, 2 * 8192
    flops = costs.loss_flops(job, Setting())
    assert flops.total == pytest.approx(2 * 4 * pairs * d, rel=0.01)  # the diagonal is whole
    assert flops.forward == pytest.approx(2 * pairs * d, rel=0.02)
    # 6 · 7.5e9 a token, and causal attention over 8192: 6 · 32 · 4096 · 8192.
    assert costs.model_flops(job) == pytest.approx(tokens * (6 * 7.5045e9 + 6.44e9), rel=1e-3)
    assert costs.loss_memory(job, Setting()) == 2 * tokens * d * 2 + 64 * MIB
    assert costs.model_memory(job) == 16 * L8B.parameters + 32 * tokens * d * 2
    assert costs.loss_traffic(job, Setting()) == (0, 0)
    assert sum(costs.model_traffic(job)) == 0


def test_one_long_row_has_no_symmetry_in_backward() -> None:
    job = Job(L8B, length=8192)
    flops = costs.loss_flops(job, Setting())
    assert flops.total == pytest.approx(5 * 8192**2 * 4096, rel=0.01)
    chunked = costs.loss_flops(job, Setting(chunk=1024))
    assert chunked.total == 8192 * (2 * (1024 + 128) + 2 * 1024) * 4096  # tiles of 128


@pytest.mark.parametrize(("rows", "length"), [(1, 64), (1, 96), (5, 96), (6, 96)])
def test_symmetry_in_backward_is_where_triton_has_it(
    rows: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (costs.SCRATCH, costs.SYMMETRIC_TOKEN) == (triton.SCRATCH, triton.TOKEN)
    seen = []
    over_pairs = triton.Problem.over_pairs

    def watch(problem, kernel, launch, *tensors, **flags):
        seen.extend([flags["SYMMETRIC"]] if "SYMMETRIC" in flags else [])
        over_pairs(problem, kernel, launch, *tensors, **flags)

    monkeypatch.setattr(triton.Problem, "over_pairs", watch)
    monkeypatch.setattr(triton, "SCRATCH", 2**15)
    monkeypatch.setattr(costs, "SCRATCH", 2**15)
    monkeypatch.setattr(triton, "blocks", lambda dtype, device: small_blocks(0))
    hidden, labels = torch.randn(rows, length, 64), torch.randint(9, (rows, length))
    saved = triton.forward(hidden, labels, None, Form(0.1, "out"))
    triton.backward(torch.ones_like(saved[0]), hidden, labels, None, saved[3:], Form(0.1, "out"))
    job = Job(SMALL, length, rows=rows, itemsize=4)
    assert set(seen) == {costs.symmetric_backward(job, Setting())}


def test_sharing_and_repeating_the_work_of_tp() -> None:
    job = Job(L8B, length=4096, rows=4, gpus=8, tp=8)
    product = 2 * 4 * 4096**2 * 4096
    assert costs.loss_flops(job, Setting()) == (product / 8, 2 * product / 8)
    hidden = job.hidden_bytes
    assert costs.loss_traffic(job, Setting()) == (20 * job.tokens * 7 / 8, hidden * 7 / 8)
    repeated = Setting(split=False)
    assert costs.loss_flops(job, repeated) == costs.loss_flops(replace(job, tp=1), repeated)
    assert costs.loss_traffic(job, repeated) == (0, 0)


def test_a_row_for_every_rank() -> None:
    job = Job(L8B, length=4096, rows=8, gpus=8, tp=2, cp=4)
    alone = Job(L8B, length=4096)
    assert costs.loss_flops(job, Setting()) == costs.loss_flops(alone, Setting())
    hidden, others = 4096 * 2, 4096 * 3 / 4  # bytes of a token; tokens of a row on other ranks
    copies = job.tokens / 2  # that the other rank of TP computed
    forward, backward = costs.loss_traffic(job, Setting())
    assert forward == others * (8 + hidden + 12) + copies * 12
    assert backward == others * (4 + 2 * hidden) + copies * hidden
    row = 4096 * hidden
    assert costs.loss_memory(job, Setting()) == job.hidden_bytes + 5 * row + 64 * MIB
    many = replace(job, rows=8 * 9)  # four rows of 32 MiB at a time
    assert costs.loss_memory(many, Setting()) == many.hidden_bytes + 5 * 4 * row + 64 * MIB
    fewer = replace(job, rows=7)
    assert costs.loss_flops(fewer, Setting()).total == 6 * 7 * 1024 * 4096 * 4096 / 2
    share = costs.shares(job, Setting(), tflops=1, link=1)
    own, model = costs.loss_flops(job, Setting()).total / 1e12, costs.model_flops(job) / 1e12
    assert share.time == pytest.approx((own + (forward + backward) / 1e9) / model)


@pytest.mark.parametrize(
    ("length", "rows", "chunk", "symmetric"),
    [
        (8192, 16, None, True),
        (16384, 8, None, False),
        (16384, 64, None, False),
        (16384, 8, 8192, False),
    ],
)
def test_a_turn_of_whole_rows_has_room_for_its_own_m(
    length: int, rows: int, chunk: int | None, symmetric: bool
) -> None:
    """Chunks are segments of whole rows, whose M is as large with them as without."""
    job = Job(L8B, length=length, rows=rows, gpus=8, tp=2, cp=4)
    span = chunk or length
    expected = costs.symmetric_flops(job.tokens, span, 4096, symmetric_backward=symmetric)
    assert costs.loss_flops(job, Setting(chunk=chunk)).total == expected.total / 2


def test_chunks_that_end_with_a_shard_stay_at_home() -> None:
    job = Job(L8B, length=32_768, rows=2, gpus=8, tp=2, cp=4)
    setting = Setting(chunk=4096)
    assert costs.loss_traffic(job, setting) == (12 * 8192, 8192 * 4096 * 2)  # from the other of TP
    alone = Job(L8B, length=8192)
    expected = costs.symmetric_flops(8192, 4096, 4096, symmetric_backward=False)
    assert costs.loss_flops(job, setting) == expected
    assert costs.loss_memory(job, setting) == job.hidden_bytes + 5 * alone.hidden_bytes + 64 * MIB
    one = replace(job, rows=1)
    assert costs.loss_traffic(one, setting) == (20 * 8192 / 2, 8192 * 4096 * 2 / 2)


def test_context_parallelism() -> None:
    job = Job(L8B, length=32_768, gpus=4, cp=4)
    assert job.tokens == 8192
    assert costs.loss_flops(job, Setting()).total == 6 * 8192 * 32_768 * 4096
    forward, backward = costs.loss_traffic(job, Setting())
    hidden = 3 * 8192 * 4096 * 2
    assert forward == hidden + 3 * 8192 * (8 + 4)
    assert backward == hidden + 3 * 8192 * 16
    packed = replace(job, document=32_768)  # of which ranks tell each other, too
    assert costs.loss_traffic(packed, Setting()) == (forward + 3 * 8192 * 8, backward)
    twice = costs.loss_traffic(job, Setting("decoupled"))
    assert twice == (forward + hidden, backward)
    again = costs.loss_flops(job, Setting("decoupled")).forward / (2 * 8192 * 32_768 * 4096)
    assert again == pytest.approx(1 + costs.sharded_positive_share(8192))  # of a shard's columns


@pytest.mark.parametrize(
    ("chunk", "document", "expected"),
    [
        (None, None, 7 * 1024),
        (1024, None, 0),  # a shard
        (512, None, 0),
        (4096, None, 3 * 1024),
        (8192, None, 7 * 1024),
        (None, 1000, 1000 + 2048),  # halves of its first and of its last, in parts of a tile
        (None, 6000, 7 * 1024),
        (2048, 1000, 1024),
        (1024, 1000, 0),
    ],
)
def test_who_sends(chunk: int | None, document: int | None, expected: int) -> None:
    wide = replace(SMALL, hidden=8192)
    job = Job(wide, length=8192, gpus=8, cp=8, document=document)
    assert costs.arriving(job, Setting(chunk=chunk)) == expected


@pytest.mark.parametrize(
    ("tile", "chunk", "document", "expected"),
    [
        (128, None, None, 8192),
        (128, 512, None, 512),
        (128, 64, None, 128),
        (2048, 512, None, 1024),  # a shard
        (128, None, 1000, 1256),
        (128, 1024, 1000, 1024),
        (2048, None, 6000, 8192),
    ],
)
def test_tiles_cover_more_than_the_span(
    tile: int, chunk: int | None, document: int | None, expected: int
) -> None:
    job = Job(SMALL, length=8192, gpus=8, cp=8, document=document)
    assert costs.covered(job, Setting(chunk=chunk), tile) == expected


def test_memory_of_shards() -> None:
    job = Job(L8B, length=32_768, gpus=8, tp=2, cp=4)
    hidden, known = 8192 * 4096 * 2, 32_768 * 300
    tiles = 4 * (4 * 2048 * 4096 + 2048**2)
    shared = costs.loss_memory(job, Setting())
    assert shared == hidden + hidden + 4 * 16 * MIB + tiles + known  # float32 of half the tokens
    assert costs.loss_memory(job, Setting(split=False)) == shared + hidden


@pytest.mark.parametrize("variant", ["out", "decoupled"])
def test_layers_within_cost_as_much_each(variant: str) -> None:
    setting, one = Setting(variant), Job(L8B, length=2048, rows=4)
    three = replace(one, within=2)
    once = costs.loss_flops(one, setting)
    assert costs.loss_flops(three, setting) == (3 * once.forward, 3 * once.backward)
    assert costs.model_flops(three) == costs.model_flops(one)
    more = costs.loss_memory(three, setting) - costs.loss_memory(one, setting)
    assert more == 2 * one.hidden_bytes


def test_layers_within_travel_as_the_last_and_are_gathered_for_tensor_parallelism() -> None:
    one = Job(L8B, length=8192, gpus=8, tp=4, cp=2)
    three, setting = replace(one, within=2), Setting()
    once, all_ = costs.loss_traffic(one, setting), costs.loss_traffic(three, setting)
    assert once.forward > 0
    assert all_.forward == 3 * once.forward + 2 * 3 / 4 * one.hidden_bytes
    assert all_.backward == 3 * once.backward
    more = costs.loss_memory(three, setting) - costs.loss_memory(one, setting)
    assert more == 2 * 2 * one.hidden_bytes
    alone = Job(L8B, length=2048, gpus=8, within=1)
    assert costs.loss_traffic(alone, setting) == (0, 0)


def test_spans() -> None:
    job = Job(SMALL, length=8192, document=3000)
    assert Setting().span(job) == 3000
    assert Setting(chunk=1024).span(job) == 1024
    assert Setting(chunk=4096).span(job) == 3000
    assert Setting(chunk=4096).span(replace(job, document=None)) == 4096
    assert Setting().span(replace(job, document=None)) == 8192


def test_no_rate_is_too_high() -> None:
    job = Job(L8B, length=8192, gpus=2, cp=2)
    slow, fast = (costs.shares(job, Setting(), tflops=t, link=1e3 * t) for t in (1.0, 1e300))
    assert fast.time == pytest.approx(slow.time)
    assert costs.shares(job, Setting(), tflops=1e300, link=1e-300).time == float("inf")


def test_decoupled_adds_the_tiles_of_positives() -> None:
    job = Job(L8B, length=8192)
    out, decoupled = (costs.loss_flops(job, Setting(v)) for v in ("out", "decoupled"))
    assert decoupled.backward == out.backward
    assert decoupled.forward == pytest.approx(out.forward * 1.054, rel=1e-3)


def test_traffic_of_the_model() -> None:
    job = Job(SMALL, length=512, rows=2, gpus=16, tp=2, cp=4)  # data 2
    data, tensor, context = costs.model_traffic(job)
    assert data == 3 * 9000 * 2 / 2 * 7 / 8
    hidden = 2 * 128 * 64 * 2
    assert tensor == 3 * 4 * 2 * hidden / 2  # layers, all-reduces, (p - 1) / p twice
    keys_and_values = 2 * (2 * 128 * 16 * 2) / 2
    assert context == 3 * 3 * keys_and_values * 3


def test_pipelines_put_the_loss_on_the_last_stage() -> None:
    job = Job(L8B, length=8192, gpus=8)
    piped = replace(job, pp=4)
    assert costs.loss_flops(piped, Setting()) == costs.loss_flops(job, Setting())
    assert costs.model_flops(piped) == costs.model_flops(job) / 4


def test_time_of_shared_pairs_is_the_larger_of_work_and_transfer() -> None:
    job, setting = Job(L8B, length=65_536, gpus=8, cp=8), Setting()
    at = costs.shares(job, setting, tflops=400, link=1e9)
    assert at.time == pytest.approx(costs.PAIRS * at.flops)
    slow = costs.shares(job, setting, tflops=400, link=1)
    seconds = costs.loss_traffic(job, setting).total / 1e9
    assert slow.time == pytest.approx(seconds / (costs.model_flops(job) / 400e12))
    assert slow.time > at.time
    assert slow.received == costs.loss_traffic(job, setting).total / sum(costs.model_traffic(job))


def test_time_is_the_sum_where_ranks_of_tp_share_the_pairs() -> None:
    job = Job(L8B, length=65_536, gpus=8, tp=2, cp=4)
    rates = {"tflops": 400, "link": 50}
    shared, repeated = (costs.shares(job, Setting(split=s), **rates) for s in (True, False))
    waiting = [
        costs.loss_traffic(job, Setting(split=s)).total / 50e9 / (costs.model_flops(job) / 400e12)
        for s in (True, False)
    ]
    assert shared.time == pytest.approx(costs.PAIRS * shared.flops + waiting[0])
    assert repeated.time == pytest.approx(max(costs.PAIRS * repeated.flops, waiting[1]))
    alone = costs.shares(replace(job, cp=1, gpus=2), Setting(split=False), **rates)
    assert alone.time == alone.flops  # whole rows, by the kernels of `simreg_loss`


@pytest.mark.parametrize("layers", [12, 80])
def test_at_any_length_the_share_of_flops_stays_below_one_over_the_layers(layers: int) -> None:
    model = replace(SMALL, layers=layers)
    for length in (2**12, 2**20, 2**30):
        job = Job(model, length=length, gpus=16, cp=16)
        assert costs.shares(job, Setting(), tflops=1, link=1).flops < 1 / layers
    assert costs.shares(job, Setting(), tflops=1, link=1).flops == pytest.approx(1 / layers, 1e-3)
