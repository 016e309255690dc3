"""DTensors as local tensors and the process groups that their placements mean."""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from simreg.parallel.peers import Peers

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def localize(
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    positions: Tensor | None,
    peers: Peers,
    copies: Peers,
) -> tuple[Tensors, Peers, Peers]:
    """The local part of each tensor, and the groups; plain tensors and groups as they are.

    Of a DTensor ``[B, L, d]`` (``[T, d]``), a mesh dimension that shards tokens gives the peers,
    one that shards rows nothing, and one that replicates the copies (if several do, the last: the
    others repeat its work). What is sharded along d or partial is made whole first.

    Raises:
        ValueError: if groups are given beside a DTensor; if several mesh dimensions shard the
            tokens; if others than `hidden` are DTensors and it is not, or fit neither the whole
            nor the local part of it.
    """
    others = {"labels": labels, "segments": segments, "positions": positions}
    if not isinstance(hidden, DTensor):
        for name, value in others.items():
            if isinstance(value, DTensor):
                raise ValueError(f"{name}: expected a plain tensor, like hidden, got a DTensor")
        return (hidden, labels, segments, positions), peers, copies
    if peers.group is not None or copies.group is not None:
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
    whole = hidden.shape[:-1]
    local = hidden.redistribute(mesh, placements).to_local()
    parts = [_part(name, v, whole, local, mesh, placements) for name, v in others.items()]
    return (local, parts[0], parts[1], parts[2]), peers, copies


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
