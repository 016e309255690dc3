"""Tokens spread over processes, against one process that holds whole rows."""

import copy
import importlib
import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import fuzz
from simreg import SimRegLoss, attach, simreg_loss
from simreg.kernels import rectangular
from simreg.loss import VARIANTS
from simreg.parallel import ShardedSimRegLoss, sharded_simreg_loss, shards
from simreg.parallel.peers import HEADER_BYTES, Header
from tests.kernels.problems import needs_triton
from tests.kernels.problems import problem as plain_problem
from tests.parallel import worlds

LAYOUTS = ("even", "uneven", "head-tail", "mixed")


def check(problem, parts, rank, consecutive=False, ways=(True, False), **groups):
    """float64: within 1e-12 of the reference; else the rule of `fuzz`, in each rank's tokens.

    `ways`: with whole rows for each rank if they suffice, and tile by tile.
    """
    positions = None if consecutive else parts[rank]
    exact = fuzz.evaluate(problem, "reference", torch.float64)
    if len(problem.labels) < math.prod(dist.get_world_size(group) for group in groups.values()):
        ways = (False,)
    for whole_rows in ways:
        ours = worlds.evaluate(worlds.take(problem, parts[rank]), positions, whole_rows, **groups)
        if ours[0].numel():
            judge(ours, exact, problem, parts[rank])


def judge(ours, exact, problem, part):
    truth = [value[:, part] for value in exact]
    if problem.hidden.dtype == torch.float64:
        per_weight = 1 / problem.form.temperature + problem.form.push
        pull = problem.weights.abs().max() * per_weight  # what a gradient is a sum of
        scales = [1, 1, 1, max(exact[3].abs().max(), pull)]
        for name, a, b, scale in zip(fuzz.NAMES, ours, truth, scales, strict=True):
            torch.testing.assert_close(
                a / scale, b / scale, rtol=1e-12, atol=1e-12, equal_nan=True,
                msg=lambda text: f"{name}: {problem}\n{text}",  # noqa: B023
            )  # fmt: skip
        return
    naive = [v[:, part] for v in fuzz.evaluate(problem, "reference", problem.hidden.dtype)]
    if naive[3].isinf().any():  # a gradient beyond float16
        return
    units = fuzz.units(problem, exact[3])
    for name, *values in zip(fuzz.NAMES, ours, naive, truth, units, strict=True):
        assert fuzz.ratio(*values) <= 2, f"{name}: {problem}"


def _random_problems(rank, ranks, seeds):
    for seed in seeds:
        problem = fuzz.random_problem(seed, worlds.BLOCK)
        if seed % 3:
            problem = problem._replace(hidden=problem.hidden.double())
        layout = LAYOUTS[seed // 4 % 4]
        parts = worlds.deal(layout, problem.labels.shape[1], ranks, seed)
        if seed % 5 == 0:  # one rank holds only ignored tokens
            problem.labels[:, parts[seed % ranks]] = -100
        consecutive = layout in ("even", "uneven")
        check(problem, parts, rank, consecutive, group=dist.group.WORLD)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sharded_rows_are_whole_rows(ranks):
    worlds.run(_random_problems, ranks, ranks, range(100 * ranks, 100 * ranks + 40))


@pytest.mark.parametrize("kernels", [pytest.param("fused", marks=needs_triton), "plain"])
@pytest.mark.parametrize("seed", range(0, 120, 3))
def test_products_of_bfloat16_are_as_accurate_as_the_naive_loss(monkeypatch, seed, kernels):
    """What CUDA does with bfloat16, its product being exact here; with Triton and without."""
    if kernels == "plain":
        monkeypatch.setattr(rectangular, "no_triton", lambda hidden: "not asked for")
    else:
        worlds.only_fused(monkeypatch)
    if kernels == "fused" and seed % 2:
        fused = importlib.import_module("simreg.kernels.fused")
        monkeypatch.setattr(fused, "ROWS", 4)
        monkeypatch.setattr(fused, "COLS", 8)
    worlds.as_on_cuda(monkeypatch)
    monkeypatch.setattr(shards, "block", lambda device: worlds.BLOCK)
    problem = fuzz.random_problem(seed, worlds.BLOCK)
    problem = problem._replace(hidden=problem.hidden.bfloat16())
    check(problem, [torch.arange(problem.labels.shape[1])], 0, ways=[False])


@needs_triton
def test_fused_kernels_do_not_hide_nan(monkeypatch):
    worlds.as_on_cuda(monkeypatch)
    worlds.only_fused(monkeypatch)
    monkeypatch.setattr(shards, "block", lambda device: worlds.BLOCK)
    hidden, labels, _ = plain_problem(1, 40, 8, 3, dtype=torch.bfloat16)
    hidden[0, 7, 2] = torch.nan
    hidden, labels = hidden.requires_grad_(), labels.clamp_min(0)
    loss = sharded_simreg_loss(hidden, labels, reduction="none")
    assert loss.isnan().all()
    loss.sum().backward()
    assert hidden.grad.isnan().all()


def _fused_problems(rank, seeds):
    with pytest.MonkeyPatch.context() as patch:
        worlds.as_on_cuda(patch)
        worlds.only_fused(patch)
        for seed in seeds:
            problem = fuzz.random_problem(seed, worlds.BLOCK)
            problem = problem._replace(hidden=problem.hidden.bfloat16())
            length = problem.labels.shape[1]
            parts = worlds.deal(LAYOUTS[seed % 4], length, 2, seed)
            tiles = {"ways": [False]}
            check(problem, parts, rank, group=dist.group.WORLD, **tiles)
            check(problem, [torch.arange(length)] * 2, rank, replicas=dist.group.WORLD, **tiles)


@needs_triton
def test_fused_kernels_meet_pieces_and_turns():
    worlds.run(_fused_problems, 2, range(2000, 2020))


def _replicated_and_both(rank, seeds):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    sharded, copied = mesh.get_local_rank("cp"), mesh.get_group("tp")
    for seed in seeds:
        problem = fuzz.random_problem(seed, worlds.BLOCK)
        problem = problem._replace(hidden=problem.hidden.double()) if seed % 3 else problem
        length = problem.labels.shape[1]
        check(problem, [torch.arange(length)] * 4, rank, replicas=dist.group.WORLD)
        parts = worlds.deal(LAYOUTS[seed % 4], length, 2, seed)
        check(problem, parts, sharded, group=mesh.get_group("cp"), replicas=copied)


def test_copies_share_the_work_and_have_the_whole_result():
    worlds.run(_replicated_and_both, 4, range(1000, 1030))


def _reductions(rank, variant):
    hidden, labels, ids = plain_problem(2, 50, 8, 6, segments=2)
    part = slice(None), (slice(0, 20), slice(20, 50))[rank]
    options = {"variant": variant, "temperature": 0.2}
    for reduction in ("sum", "mean"):
        whole = simreg_loss(hidden, labels, segments=ids, reduction=reduction, **options)
        mine = sharded_simreg_loss(
            hidden[part], labels[part], segments=ids[part], reduction=reduction,
            group=dist.group.WORLD, **options,
        )  # fmt: skip
        dist.all_reduce(mine)
        torch.testing.assert_close(mine, whole)

    objective = ShardedSimRegLoss(0.7, group=dist.group.WORLD, **options)
    expected, metrics = SimRegLoss(0.7, **options)(hidden, labels, ids)
    loss, mine = objective(hidden[part], labels[part], ids[part])
    tokens = (labels[part] >= 0).sum()
    positives = mine["pos_fraction"] * tokens
    values = torch.stack([loss, mine["loss"] * tokens, positives, mine["pos_cos"] * positives])
    dist.all_reduce(values)
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(values[1] / (labels >= 0).sum(), metrics["loss"])
    assert float(values[2] / (labels >= 0).sum()) == pytest.approx(float(metrics["pos_fraction"]))
    torch.testing.assert_close(values[3] / values[2], metrics["pos_cos"], rtol=1e-6, atol=0)
    scaled, _ = objective(hidden[part], labels[part], ids[part], num_items=1000)
    torch.testing.assert_close(scaled * 1000, loss * (labels >= 0).sum())
    _refusals(rank)


def _refusals(rank):
    """An error on one rank is one on all, at once."""
    hidden, labels = torch.randn(1, 8, 4, requires_grad=True), torch.zeros(1, 8, dtype=torch.int64)
    bad = labels.int() if rank else labels
    shorter = hidden[:, : 8 - rank], labels[:, : 8 - rank]
    began = time.monotonic()
    with pytest.raises(ValueError, match="labels: expected" if rank else "refused on rank 1"):
        sharded_simreg_loss(hidden, bad, group=dist.group.WORLD)
    whole = {"group": dist.group.WORLD}
    same = "expected the same on all ranks"
    with pytest.raises(
        ValueError, match=rf"{same}.*temperature 0.1 on .* temperature 1.1 on|1.1.*0.1"
    ):
        sharded_simreg_loss(hidden, labels, temperature=0.1 + rank, **whole)
    differs = f"{same} of group, got push {1.0 + rank} on rank {rank} and push {2.0 - rank} on rank"
    with pytest.raises(ValueError, match=f"{differs} {1 - rank}$"):
        sharded_simreg_loss(hidden, labels, push=1.0 + rank, **whole)
    with pytest.raises(ValueError, match=rf"{same} of group, got push_above 0.\d on rank"):
        sharded_simreg_loss(hidden, labels, push=1.0, push_above=0.5 + 0.1 * rank, **whole)
    for other in ("other", "weighted"):  # on all ranks
        with pytest.raises(ValueError, match="reduction: expected one of"):
            sharded_simreg_loss(hidden, labels, reduction=other, **whole)
    for reduction in ("sum", "other"):
        with pytest.raises(ValueError, match="reduction" if rank else f"{same}|refused on rank 1"):
            sharded_simreg_loss(hidden, labels, reduction=reduction if rank else "mean", **whole)
    half = torch.zeros(1, 8, 2 + 2 * rank, requires_grad=True)
    more = {"segments": labels} if rank else {}
    for name, given, options in (
        ("rows", (hidden.repeat(1 + rank, 1, 1), labels.repeat(1 + rank, 1)), {}),
        ("d", (half, labels), {}),
        ("dtype", (hidden.double() if rank else hidden, labels), {}),
        ("segments given", (hidden, labels), more),
        ("variant", (hidden, labels), {"variant": "in" if rank else "out"}),
        ("chunk_size", (hidden, labels), {"chunk_size": 4 + rank}),
        ("ignore_index", (hidden, labels), {"ignore_index": -100 - rank}),
    ):
        with pytest.raises(ValueError, match=f"{same} of group, got {name} "):
            sharded_simreg_loss(*given, **options, **whole)
    with pytest.raises(ValueError, match=f"{same}.*weight"):
        ShardedSimRegLoss(1.0 + rank, **whole)(hidden, labels)
    with pytest.raises(ValueError, match=f"{same}.*num_items"):
        ShardedSimRegLoss(**whole)(hidden, labels, num_items=10 + rank)
    with pytest.raises(ValueError, match="num_items: expected" if rank else "refused on rank 1"):
        ShardedSimRegLoss(**whole)(hidden, labels, num_items=-1 if rank else 8)
    with pytest.raises(OverflowError if rank else ValueError, match="" if rank else "rank 1"):
        ShardedSimRegLoss(**whole)(hidden, labels, num_items=10**400 if rank else 8)
    ShardedSimRegLoss(**whole)(hidden, labels, num_items=8.0 if rank else 8)
    equal = ShardedSimRegLoss(**whole)
    equal.weight = 1 if rank else 1.0
    equal(hidden, labels)
    given = {"positions": None if rank else torch.arange(8), "chunk_size": 4}
    with pytest.raises(ValueError, match=f"{same}.*positions"):
        sharded_simreg_loss(hidden, labels, **given, **whole)
    with pytest.raises(ValueError, match=r"replicas.*same tokens.*rows of . on rank . and of"):
        sharded_simreg_loss(*shorter, replicas=dist.group.WORLD)
    ids, places = labels.clone(), torch.arange(8)
    ids[:, :4] = rank
    for other in (
        {"labels": labels + rank},
        {"labels": places[None].roll(rank)},  # the same ones in another order
        {"labels": labels, "segments": ids},
        {"labels": labels, "chunk_size": 4, "positions": places + 4 * rank},
    ):
        with pytest.raises(ValueError, match=r"replicas.*same labels, segments and positions"):
            sharded_simreg_loss(hidden, **other, replicas=dist.group.WORLD)
    with pytest.raises(ValueError, match="they overlap"):
        sharded_simreg_loss(hidden, labels, replicas=dist.group.WORLD, **whole)
    replicas = dist.group.WORLD if rank else None
    with pytest.raises(ValueError, match="they overlap" if rank else "refused on rank 1"):
        sharded_simreg_loss(hidden, labels, replicas=replicas, **whole)
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match=r"group: expected a process group, got DeviceMesh \(of"):
        sharded_simreg_loss(hidden, labels, group=mesh)
    alone = [dist.new_group([r]) for r in (0, 1)]
    with pytest.raises(ValueError, match="group: expected a process group that this rank is in"):
        sharded_simreg_loss(hidden, labels, group=alone[1 - rank])
    with pytest.raises(ValueError, match="requires_grad"):
        sharded_simreg_loss(hidden.detach() if rank else hidden, labels, **whole)
    with pytest.raises(ValueError, match="positions"):
        sharded_simreg_loss(hidden, labels, positions=labels[0, :3], **whole)
    if rank:  # not a ValueError, but the other rank must hear of it too
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.grad(lambda x: sharded_simreg_loss(x, labels, **whole))(hidden)
    else:
        with pytest.raises(ValueError, match="refused on rank 1"):
            sharded_simreg_loss(hidden, labels, **whole)
    model = nn.Sequential(nn.Linear(4, 4))
    with attach(model, ShardedSimRegLoss(**whole), module=model[0]):
        twin = copy.deepcopy(model)  # process groups can't be copied
        assert twin(hidden).shape == hidden.shape
    with attach(model, ShardedSimRegLoss(**whole), module=model[0]) as reg:
        for wrong in ("labels", "shift", "pass"):  # on one rank, before the loss has them
            if rank and wrong == "pass":
                with pytest.raises(RuntimeError, match="no hidden states to regularize"):
                    reg(labels, shift=False)
                continue
            model(hidden)
            given = labels[:, :3] if rank and wrong == "labels" else labels
            told = "refused on rank 1" if not rank else f"{wrong}: "
            with pytest.raises(ValueError, match=told):
                reg(given, shift=bool(rank) and wrong == "shift")
            reg.forget()
        model(hidden)
        reg(labels, shift=False)
    objective = nn.Sequential(ShardedSimRegLoss(0.7, **whole))
    twin = copy.deepcopy(objective)[0]
    assert (twin.weight, twin.group, twin.replicas) == (0.7, dist.group.WORLD, None)
    assert twin is not objective[0]
    torch.testing.assert_close(twin(hidden, labels)[0], objective[0](hidden, labels)[0])
    loss = sharded_simreg_loss(hidden, labels, group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_add_up_and_errors_reach_every_rank(variant):
    worlds.run(_reductions, 2, variant)


def test_long_headers_differ_in_their_last_words():
    text = ", ".join(f"name {i}" for i in range(80))
    one, same, other = (Header(True, 3, -5, rest) for rest in (text, text, text[:-1] + "8"))
    read = [Header.unpack(header.pack()) for header in (one, same, other)]
    assert read[0] == read[1] != read[2]
    assert len(one.pack()) * 8 == HEADER_BYTES
    assert Header.unpack(Header(rest=text[:381]).pack()).rest == text[:381]


def test_chunks_of_any_size():
    hidden, labels, _ = plain_problem(1, 40, 8, 5)
    whole = simreg_loss(hidden, labels)
    for size in (2**62, 2**63, 10**30):
        torch.testing.assert_close(sharded_simreg_loss(hidden, labels, chunk_size=size), whole)


def _one_bad_rank_of_a_grid(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    groups = {"group": mesh.get_group("cp"), "replicas": mesh.get_group("tp")}
    hidden, labels = torch.randn(1, 8, 4), torch.zeros(1, 8, dtype=torch.int64)
    for bad in (labels.int(), labels + 1):  # refused there; only other than its copy's
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"labels|refused"):
            sharded_simreg_loss(hidden, bad if rank == 3 else labels, **groups)
        assert time.monotonic() - began < 20


def test_every_rank_of_a_grid_hears_of_a_bad_one():
    worlds.run(_one_bad_rank_of_a_grid, 4)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_input_is_as_in_one_process(shape):
    hidden = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    options = {"segments": labels, "chunk_size": 3}
    loss = sharded_simreg_loss(hidden, labels, **options)
    loss.backward()
    assert loss.item() == pytest.approx(simreg_loss(hidden.detach(), labels, **options).item())
    assert hidden.grad.shape == shape


@pytest.mark.parametrize("flat", [False, True])
def test_one_process_needs_no_group(flat):
    hidden, labels, ids = plain_problem(1 if flat else 3, 70, 8, 6, segments=2)
    if flat:
        hidden, labels, ids = hidden[0], labels[0], ids[0]
    options = {"segments": ids, "chunk_size": 33, "reduction": "none"}
    results = []
    for function in (simreg_loss, sharded_simreg_loss):
        x = hidden.clone().requires_grad_()
        loss = function(x, labels, **options)
        loss.square().sum().backward()
        results.append((loss, x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_in_one_process_the_objective_is_simreg_loss():
    """Whatever its options, none of them the default; also of rows whose tokens are in disorder."""
    hidden, labels, ids = plain_problem(3, 40, 8, 6, segments=2)
    options = {
        "weight": 0.7, "temperature": 0.2, "variant": "in", "chunk_size": 7,
        "ignore_index": 1, "push": 2.0, "push_above": 0.1,
    }  # fmt: skip
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    expected, metrics = SimRegLoss(**options)(hidden, labels, ids, num_items=9)
    objective = ShardedSimRegLoss(**options)
    mixed = hidden[:, order], labels[:, order], ids[:, order]
    for given, positions in (((hidden, labels, ids), None), (mixed, order)):
        loss, found = objective(*given, num_items=9, positions=positions)
        torch.testing.assert_close((loss, found), (expected, metrics), rtol=1e-12, atol=1e-12)


NAMES = ["labels", "positions", "variant", "chunk_size", "reduction", "ignore_index"]


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_simreg_loss_refuses(name):
    arguments = {"hidden": torch.randn(1, 8, 4), "labels": torch.zeros(1, 8, dtype=torch.int64)}
    arguments[name] = 0.5
    with pytest.raises(ValueError, match=name):
        sharded_simreg_loss(**arguments)


def test_ignored_tokens_are_never_read():
    hidden, labels, _ = plain_problem(1, 40, 8, 5)
    clean = hidden.masked_fill((labels < 0)[..., None], 0).requires_grad_()
    dirty = hidden.masked_fill((labels < 0)[..., None], torch.nan).requires_grad_()
    for x in (clean, dirty):
        sharded_simreg_loss(x, labels).backward()
    assert torch.equal(clean.grad, dirty.grad)


def test_nothing_to_compare_gives_zero():
    for labels in (torch.full((2, 5), -100), torch.arange(10).view(2, 5)):
        hidden = torch.randn(2, 5, 4, requires_grad=True)
        loss = sharded_simreg_loss(hidden, labels)
        loss.backward()
        assert loss == 0
        assert not hidden.grad.any()


def test_works_inside_a_compiled_function_and_under_autocast():
    hidden, labels, _ = plain_problem(1, 40, 8, 5, dtype=torch.float32)

    @torch.compile
    def step(x):
        return sharded_simreg_loss(2 * x, labels, temperature=0.1)

    expected = simreg_loss(2 * hidden, labels)
    torch.testing.assert_close(step(hidden), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sharded_simreg_loss(2 * hidden, labels), expected)
