"""Whole rows: whose they are, what travels, how much is kept."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from simreg import simreg_loss
from simreg.kernels import op
from simreg.parallel import peers, rows, sharded_simreg_loss
from tests.kernels.problems import problem
from tests.parallel import worlds
from tests.parallel.test_shards import Wire
from tests.peak import Peak

ROW = 37


class Seen:
    """The rows that this rank computes."""

    def __init__(self, patch):
        self.forward, self.backward = [], []
        loss, gradient = op.loss, op.loss_backward

        def seen_loss(hidden, *rest):
            self.forward.append(hidden.shape)
            return loss(hidden, *rest)

        def seen_gradient(grad, hidden, *rest):
            self.backward.append(hidden.shape)
            return gradient(grad, hidden, *rest)

        patch.setattr(op, "loss", seen_loss)
        patch.setattr(op, "loss_backward", seen_gradient)


def _grid(rank, shape, turn):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("cp", "tp"))
    groups = {"group": mesh.get_group("cp"), "replicas": mesh.get_group("tp")}
    workers, me = shape[0] * shape[1], mesh.get_local_rank("cp")
    for batch in (workers, workers + 1, 2 * workers + 1):
        hidden, labels, ids = problem(batch, ROW, 8, 5, segments=3)
        part = worlds.deal("uneven" if batch % 2 else "mixed", ROW, shape[0], batch)
        width = max(map(len, part))
        rows.ROUND = turn * shape[0] * width * 8 * 8
        options = {"chunk_size": 11, "variant": ("out", "in", "decoupled")[batch % 3], "push": 2.0}
        mine, whole = (x.detach().clone().requires_grad_() for x in (hidden[:, part[me]], hidden))
        scales = torch.randn(batch, ROW, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            seen = Seen(patch)
            loss = sharded_simreg_loss(
                mine, labels[:, part[me]], segments=ids[:, part[me]], positions=part[me],
                reduction="none", **options, **groups,
            )  # fmt: skip
            (loss * scales[:, part[me]]).sum().backward()
        expected = simreg_loss(whole, labels, segments=ids, reduction="none", **options)
        (expected * scales).sum().backward()
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(loss, expected[:, part[me]], **close)
        torch.testing.assert_close(mine.grad, whole.grad[:, part[me]], **close)

        share = -(-batch // workers)
        counts = [min(turn, share - start) for start in range(0, share, turn)]
        assert seen.forward == seen.backward == [(n, shape[0] * width, 8) for n in counts]
        copies = [torch.empty_like(mine.grad) for _ in range(shape[1])]
        dist.all_gather(copies, mine.grad, group=groups["replicas"])
        assert all(torch.equal(copy, mine.grad) for copy in copies)


@pytest.mark.parametrize(("shape", "turn"), [((2, 2), 1), ((2, 1), 2), ((1, 3), 1)])
def test_each_rank_computes_its_rows_and_gets_everybodys_results(shape, turn):
    worlds.run(_grid, shape[0] * shape[1], shape, turn)


def _disordered(rank, mesh, batch):
    """A mesh whose groups, each sorted by torch, do not have their ranks in the same order."""
    mesh = DeviceMesh("cpu", torch.tensor(mesh), mesh_dim_names=("tp", "cp"))
    groups = {"group": mesh.get_group("cp"), "replicas": mesh.get_group("tp")}
    hidden, labels, ids = problem(batch, ROW, 8, 5, segments=3)
    part = torch.arange(ROW).tensor_split(mesh.size(1))[mesh.get_coordinate()[1]]
    whole, mine = hidden.clone().requires_grad_(), hidden[:, part].clone().requires_grad_()
    options = {"reduction": "none", "push": 2.0}
    sums = torch.arange(1.0, ROW + 1, dtype=torch.float64)
    expected = simreg_loss(whole, labels, segments=ids, **options)
    loss = sharded_simreg_loss(mine, labels[:, part], segments=ids[:, part], **options, **groups)
    (expected * sums).sum().backward()
    (loss * sums[part]).sum().backward()
    torch.testing.assert_close(loss, expected[:, part], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, whole.grad[:, part], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [4, 9])
@pytest.mark.parametrize("mesh", [[[0, 3], [1, 2]], [[0, 1], [3, 2]], [[0], [1], [2]]])
def test_groups_of_a_mesh_that_order_their_ranks_otherwise(mesh, batch):
    worlds.run(_disordered, sum(map(len, mesh)), mesh, batch)


def _three_by_two(rank):
    _disordered(rank, [[0, 5], [2, 1], [4, 3]], 7)


def test_some_groups_of_a_mesh_in_order_and_some_not():
    worlds.run(_three_by_two, 6)


def _places_unknown(rank):
    mesh = DeviceMesh("cpu", torch.tensor([[0, 1], [3, 2]]), mesh_dim_names=("tp", "cp"))
    groups = {"group": mesh.get_group("cp"), "replicas": mesh.get_group("tp")}
    hidden, labels = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.long)
    sharded_simreg_loss(hidden, labels, **groups)
    positions = torch.arange(6) + 6 * mesh.get_coordinate()[1]
    sharded_simreg_loss(hidden, labels, positions=positions, chunk_size=4, **groups)
    with pytest.raises(ValueError, match="replicas: expected the same labels, segments and posi"):
        sharded_simreg_loss(hidden, labels, chunk_size=4, **groups)


def test_copies_that_differ_in_their_place_in_the_group_must_give_positions():
    worlds.run(_places_unknown, 4)


def _wire(rank, ranks, kind):
    length, dim = 16, 32
    hidden = torch.randn(ranks, length, dim, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(length).expand(ranks, -1) % 7
    rows.ROUND = 2**30
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire(patch)
        loss = sharded_simreg_loss(hidden, labels, **{kind: dist.group.WORLD})
        header, others = (ranks - 1) * peers.HEADER_BYTES, (ranks - 1) * length
        if kind == "group":
            assert wire.embeddings == others * (8 + 2 * dim + 3 * 4)  # labels, rows; the results
            assert wire.rest == header + (ranks - 1) * 8  # how many are labelled
            loss.backward()
            assert wire.embeddings == others * (8 + 3 * 4 + 4 + 3 * 2 * dim)  # and gradients
        else:
            assert wire.rest == header + others * 3 * 4
            loss.backward()
            assert wire.rest == header + others * (3 * 4 + 2 * dim)
            assert wire.embeddings == 0


@pytest.mark.parametrize("kind", ["group", "replicas"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_on_the_wire(ranks, kind):
    worlds.run(_wire, ranks, ranks, kind)


@pytest.mark.parametrize(
    ("batch", "peers", "copies", "expected"),
    [(1, 1, 1, True), (1, 2, 1, False), (2, 1, 2, True), (3, 2, 2, False), (4, 2, 2, True)],
)
def test_a_row_for_every_rank(batch, peers, copies, expected):
    of = SimpleNamespace
    assert rows.WholeRows.suffice(batch, of(size=peers), of(size=copies)) is expected


def _at_home(rank):
    """Chunks that end with the shards: nothing to exchange but the number of labels."""
    hidden, labels, ids = problem(3, 32, 8, 5, segments=2)
    part = slice(None), slice(16 * rank, 16 * rank + 16)
    for batch, chunk, exchanged in [(3, 8, False), (1, 16, False), (3, 32, True), (3, 12, True)]:
        whole = hidden[:batch].clone().requires_grad_()
        expected = simreg_loss(whole, labels[:batch], segments=ids[:batch], chunk_size=chunk)
        expected.backward()
        mine = hidden[:batch][part].clone().requires_grad_()
        keys = labels[:batch][part], ids[:batch][part]
        with pytest.MonkeyPatch.context() as patch:
            wire = Wire(patch)
            loss = sharded_simreg_loss(
                mine, keys[0], segments=keys[1], chunk_size=chunk, group=dist.group.WORLD
            )
            loss.backward()
        assert (wire.embeddings > 0) == exchanged
        assert wire.rest == peers.HEADER_BYTES + 8
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.grad, whole.grad[part], rtol=1e-12, atol=1e-12)
        given = {"positions": torch.arange(32)[part[1]], "chunk_size": chunk, "segments": keys[1]}
        again = sharded_simreg_loss(mine, keys[0], group=dist.group.WORLD, **given)
        dist.all_reduce(again)
        torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_chunks_that_end_with_a_shard_stay_at_home():
    worlds.run(_at_home, 2)


def _no_grid(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    replicas = mesh.get_group("tp") if rank < 2 else None
    hidden, labels, _ = problem(4, 8, 4, 3)
    with pytest.raises(ValueError, match=r"replicas (1|2) on|refused on rank"):
        sharded_simreg_loss(hidden, labels, group=mesh.get_group("cp"), replicas=replicas)


def test_ranks_that_are_no_grid_are_refused_on_all():
    worlds.run(_no_grid, 4)


def _memory(rank, kind, sizes):
    batch, length, dim = 4, 512, 256
    rows.ROUND = 1  # a row at a time, here half as large as `hidden`
    peaks = []
    for _ in range(3):  # the least, as a thread of gloo may keep what it has sent a moment longer
        hidden = torch.randn(batch, length, dim).bfloat16().requires_grad_()
        labels = (torch.arange(length) * 7919 % 50).expand(batch, -1).contiguous()
        with Peak(hidden, labels) as forward:
            loss = sharded_simreg_loss(hidden, labels, **{kind: dist.group.WORLD})
        with Peak(hidden, labels) as backward:
            loss.backward()
        peaks.append((forward.peak / hidden.nbytes, backward.peak / hidden.nbytes))
    least = [min(way) for way in zip(*peaks, strict=True)]
    assert least[0] <= sizes[0], peaks
    assert least[1] <= sizes[1], peaks


@pytest.mark.parametrize(("kind", "sizes"), [("group", (1.8, 3.2)), ("replicas", (0.7, 2.0))])
def test_memory_is_that_of_a_few_rows(kind, sizes):
    worlds.run(_memory, 2, kind, sizes)
