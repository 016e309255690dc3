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
    error: ValueError | None = None
    """Why this cannot be; the groups are then those in which the other ranks can be told."""


def placing(hidden: Tensor, group: Group, replicas: Group) -> Placing:
    """Who holds what, by the groups given or by the placements of a DTensor.

    Of a DTensor ``[B, L, d]`` (``[T, d]``), a mesh dimension that shards tokens gives the peers,
    one that shards rows nothing, and one that replicates the copies (if several do, the last: the
    others repeat its work). What is sharded along d or partial will be made whole. `error`: groups
    beside a DTensor, groups that overlap or do not have this rank, several mesh dimensions that
    shard the tokens.
    """
    if not isinstance(hidden, DTensor):
        return _given(group, replicas)
    peers, copies, error = Peers(None), Peers(None), None
    if group is not None or replicas is not None:
        error = ValueError(
            "group, replicas: expected None, since the DTensor says how it is spread"
        )
    tokens, mesh = hidden.ndim - 2, hidden.device_mesh
    placements: list[Placement] = []
    for dim, placement in enumerate(hidden.placements):
        if type(placement) is Shard and placement.dim <= tokens:
            placements.append(placement)
            if placement.dim < tokens or mesh.size(dim) == 1:
                continue
            if peers.group is not None:
                error = error or ValueError(
                    "hidden: expected tokens sharded over one dimension of the mesh, got "
                    f"{hidden.placements}: flatten the mesh"
                )
                continue
            peers = Peers(mesh.get_group(dim))
        else:
            placements.append(Replicate())
            if mesh.size(dim) > 1:
                copies = Peers(mesh.get_group(dim))
    return Placing(peers, copies, mesh, placements, error)


def _given(group: Group, replicas: Group) -> Placing:
    found, error = [], None
    for name, given in (("group", group), ("replicas", replicas)):
        try:
            _check_group(name, given)
            found.append(Peers(given))
        except ValueError as refused:
            error = error or refused
            found.append(Peers(None))
    peers, copies = found
    if len(set(peers.members) & set(copies.members)) > 1:
        error = ValueError("replicas: expected no other rank of group in it, they overlap")
        copies = Peers(None)
    return Placing(peers, copies, error=error)


def _check_group(name: str, group: Any) -> None:
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{name}: expected a process group, got {type(group).__name__} (of a DeviceMesh, "
            "mesh.get_group() of one dimension)"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name}: expected a process group that this rank is in")


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

    Every rank must call, and goes through all three whatever is wrong with one: DTensors may have
    to travel.

    Raises:
        ValueError: for a DTensor beside a plain `hidden`, and for what fits neither the whole
            nor the local part of it.
    """
    others = {"labels": labels, "segments": segments, "positions": positions}
    if how.mesh is not None and how.placements is not None:
        whole, mesh, placements = hidden.shape[:-1], how.mesh, how.placements
        parts, error = [], None
        for name, value in others.items():
            try:
                parts.append(_part(name, value, whole, local, mesh, placements))
            except (ValueError, RuntimeError) as refused:
                error = error or refused
        if error is not None:
            raise error
        labels, segments, positions = parts
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
