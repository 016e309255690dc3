"""DTensors of every placement give what the whole tensor gives."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from simreg import simreg_loss
from simreg.parallel import sharded_simreg_loss
from tests.kernels.problems import problem
from tests.parallel import worlds

OPTIONS = {"chunk_size": 19, "reduction": "none"}
# Placements on the mesh (2, 2), and which part of [B, L] (halves of rows, of tokens) is local.
PLACEMENTS = {
    (Shard(1), Replicate()): (None, 0),
    (Replicate(), Shard(1)): (None, 1),
    (Shard(0), Shard(1)): (0, 1),
    (Replicate(), Replicate()): (None, None),
    (Shard(0), Replicate()): (0, None),
    (Shard(2), Shard(1)): (None, 1),
}


def _placements(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    hidden, labels, ids = problem(2, 47, 6, 5, segments=2)  # 47 tokens: shards of 24 and 23
    weights = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64).view(labels.shape)
    whole = hidden.clone().requires_grad_()
    expected = simreg_loss(whole, labels, segments=ids, **OPTIONS)
    (expected * weights).sum().backward()
    for placements, (rows, tokens) in PLACEMENTS.items():
        part = tuple(
            slice(None) if dim is None else half[mesh.get_coordinate()[dim]]
            for dim, half in ((rows, [slice(0, 1), slice(1, 2)]),
                              (tokens, [slice(0, 24), slice(24, 47)]))
        )  # fmt: skip
        spread = distribute_tensor(hidden, mesh, placements)
        others = {"whole": (labels, ids), "local": (labels[part], ids[part])}
        if Shard(2) not in placements:
            others["dtensor"] = tuple(distribute_tensor(x, mesh, placements) for x in (labels, ids))
        for kind, (y, segments) in others.items():
            x = spread.detach().clone().requires_grad_()
            places = {
                "whole": torch.arange(47),  # of all rows
                "local": torch.arange(47)[part[1]],
                "dtensor": None,
            }[kind]
            loss = sharded_simreg_loss(x, y, segments=segments, positions=places, **OPTIONS)
            torch.testing.assert_close(loss, expected[part], msg=lambda text: f"{kind}: {text}")  # noqa: B023
            (loss * weights[part]).sum().backward()
            torch.testing.assert_close(x.grad.full_tensor(), whole.grad)

    # Partial: made whole first. Its gradient is that of each summand.
    quarter = DTensor.from_local(hidden / 4, mesh, [Partial(), Partial()])
    torch.testing.assert_close(
        sharded_simreg_loss(quarter, labels, segments=ids, **OPTIONS), expected
    )

    flat = distribute_tensor(hidden[0], mesh, (Shard(0), Replicate()))
    positions = torch.arange(47).flip(0)
    loss = sharded_simreg_loss(flat, labels[0], positions=positions, **OPTIONS)
    truth = simreg_loss(hidden[0].flip(0), labels[0].flip(0), **OPTIONS).flip(0)
    torch.testing.assert_close(loss, truth.split([24, 23])[mesh.get_coordinate()[0]])

    # 5 tokens on 4 ranks: 2, 2, 1 and none.
    line = init_device_mesh("cpu", (4,))
    few = distribute_tensor(hidden[0, :5], line, [Shard(0)]).detach().requires_grad_()
    loss = sharded_simreg_loss(few, labels[0, :5] % 2, reduction="none")
    short = hidden[0, :5].clone().requires_grad_()
    truth = simreg_loss(short, labels[0, :5] % 2, reduction="none")
    torch.testing.assert_close(loss, truth.split([2, 2, 1, 0])[dist.get_rank()])
    assert truth.min() > 0
    truth.sum().backward()
    loss.sum().backward()
    torch.testing.assert_close(few.grad.full_tensor(), short.grad)

    thin = init_device_mesh("cpu", (1, 4))  # one dimension that shards nothing
    spread = distribute_tensor(hidden, thin, (Shard(1), Shard(1)))
    loss = sharded_simreg_loss(spread, labels, segments=ids, **OPTIONS)
    torch.testing.assert_close(loss, expected.split([12, 12, 12, 11], 1)[dist.get_rank()])

    spread = distribute_tensor(hidden, mesh, (Shard(1), Shard(1)))
    with pytest.raises(ValueError, match="flatten the mesh"):
        sharded_simreg_loss(spread, labels)
    with pytest.raises(ValueError, match="group, replicas: expected None"):
        sharded_simreg_loss(spread, labels, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="labels: expected a plain tensor"):
        sharded_simreg_loss(hidden, distribute_tensor(labels, mesh, (Shard(1), Replicate())))
    with pytest.raises(ValueError, match="labels: expected the shape of the whole"):
        sharded_simreg_loss(flat, labels[0, :3])


def _errors_beside_dtensors_that_travel(rank):
    mesh = init_device_mesh("cpu", (2,))
    hidden = distribute_tensor(torch.randn(1, 8, 3), mesh, [Replicate()])
    labels, positions = torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)
    travels = distribute_tensor(positions, mesh, [Shard(0)])
    ids = torch.zeros(1, 5 if rank else 8, dtype=torch.int64)
    says = "segments: expected the shape" if rank else "refused on rank 1"
    with pytest.raises(ValueError, match=says):
        sharded_simreg_loss(hidden, labels, segments=ids, positions=travels, chunk_size=4)
    ids = distribute_tensor(labels, mesh, [Shard(1)])
    says = "labels: expected the shape" if rank else "refused on rank 1"
    with pytest.raises(ValueError, match=says):
        sharded_simreg_loss(hidden, labels[:, rank:], segments=ids)
    spread = distribute_tensor(torch.randn(1, 8, 3), mesh, [Shard(1)])
    says = "group, replicas: expected None" if rank else "refused on rank 1"
    with pytest.raises(ValueError, match=says):
        sharded_simreg_loss(spread, labels, group=mesh.get_group() if rank else None)


def test_an_error_on_one_rank_leaves_no_dtensor_on_its_way():
    worlds.run(_errors_beside_dtensors_that_travel, 2)


def test_every_placement_is_the_whole_tensor():
    worlds.run(_placements, 4)
