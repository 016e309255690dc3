"""DTensors as local tensors and the process groups that their placements mean."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from simreg.parallel.peers import Peers

Group = dist.ProcessGroup | None


class Placing(NamedTuple):
    """How a tensor is spread: the groups, and of a DTensor its mesh and placements."""

    peers: Peers
    copies: Peers
    mesh: DeviceMesh | None = None
    placements: list[Placement] | None = None


def placing(hidden: Tensor, group: Group, replicas: Group) -> Placing:
    """Who holds what, by the groups given or by the placements of a DTensor.

    Of a DTensor ``[B, L, d]`` (``[T, d]``), a mesh dimension that shards tokens gives the peers,
    one that shards rows nothing, and one that replicates the copies (if several do, the last: the
    others repeat its work). What is sharded along d or partial will be made whole.

    Raises:
        ValueError: on all ranks alike: groups beside a DTensor, groups that overlap or do not have
            this rank, several mesh dimensions that shard the tokens.
    """
    peers, copies = Peers(group), Peers(replicas)
    if not isinstance(hidden, DTensor):
        for name, given in (("group", peers), ("replicas", copies)):
            if given.group is not None and given.rank < 0:
                raise ValueError(f"{name}: expected a process group that this rank is in")
        if len(peers.members & copies.members) > 1:
            raise ValueError("replicas: expected no other rank of group in it, they overlap")
        return Placing(peers, copies)
    if group is not None or replicas is not None:
        raise ValueError("group, replicas: expected None, since the DTensor says how it is spread")
    tokens, mesh = hidden.ndim - 2, hidden.device_mesh
    placements: list[Placement] = []
    for dim, placement in enumerate(hidden.placements):
        if type(placement) is Shard and placement.dim <= tokens:
            placements.append(placement)
            if placement.dim < tokens or mesh.size(dim) == 1:
                continue
            if peers.group is not None:
                raise ValueError(
                    "hidden: expected tokens sharded over one dimension of the mesh, got "
                    f"{hidden.placements}: flatten the mesh"
                )
            peers = Peers(mesh.get_group(dim))
        else:
            placements.append(Replicate())
            if mesh.size(dim) > 1:
                copies = Peers(mesh.get_group(dim))
    return Placing(peers, copies, mesh, placements)


def whole_along_d(hidden: Tensor, how: Placing) -> Tensor:
    """The local part of hidden states, with all of d; every rank must call."""
    if not isinstance(hidden, DTensor):
        return hidden
    return hidden.redistribute(how.mesh, how.placements).to_local()


def local_parts(
    hidden: Tensor,
    local: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    positions: Tensor | None,
    how: Placing,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The parts of labels, segments, positions that go with `local`, the local part of `hidden`.

    Raises:
        ValueError: for a DTensor beside a plain `hidden`, and for what fits neither the whole
            nor the local part of it.
    """
    others = {"labels": labels, "segments": segments, "positions": positions}
    if how.mesh is not None and how.placements is not None:
        whole, mesh, placements = hidden.shape[:-1], how.mesh, how.placements
        labels, segments, positions = (
            _part(name, value, whole, local, mesh, placements) for name, value in others.items()
        )
        return labels, segments, positions
    for name, value in others.items():
        if isinstance(value, DTensor):
            raise ValueError(f"{name}: expected a plain tensor, like hidden, got a DTensor")
    return labels, segments, positions


def _part(
    name: str,
    value: Any,
    whole: Any,
    local: Tensor,
    mesh: DeviceMesh,
    placements: list[Placement],
) -> Any:
    """The part of a tensor ``[B, L]`` (positions: or ``[L]``) that goes with `local`."""
    if not isinstance(value, Tensor):
        return value
    missing = len(whole) - value.ndim  # 1 for positions of all rows
    mine: list[Placement] = [
        (Shard(p.dim - missing) if p.dim >= missing else Replicate()) if isinstance(p, Shard) else p
        for p in placements
    ]
    if isinstance(value, DTensor):
        return value.redistribute(mesh, mine).to_local()
    if value.shape == local.shape[missing:-1]:
        return value
    if value.shape == whole[missing:]:
        return (
            DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim)
            .redistribute(mesh, mine)
            .to_local()
        )
    raise ValueError(
        f"{name}: expected the shape of the whole, {list(whole)}, or of the local part of hidden, "
        f"{list(local.shape[:-1])}, got {list(value.shape)}"
    )
