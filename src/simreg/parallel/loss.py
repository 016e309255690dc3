"""`simreg_loss` and `SimRegLoss` for tokens, or work, that are spread over processes."""

import contextlib
import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simreg.kernels.order import Form
from simreg.kernels.pairs import wide
from simreg.loss import (
    INTEGERS,
    PUSH,
    PUSH_ABOVE,
    REDUCTIONS,
    TEMPERATURE,
    WEIGHT,
    SimRegLoss,
    Sums,
    check_ignore_index,
    check_items,
    check_options,
    check_tensors,
    check_transforms,
    weigh,
)
from simreg.objectives import labelled
from simreg.parallel.peers import Header, Peers, agree
from simreg.parallel.placement import local_parts, placing, whole_along_d
from simreg.parallel.rows import WholeRows
from simreg.parallel.shards import Shards


def sharded_simreg_loss(
    hidden: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    replicas: dist.ProcessGroup | None = None,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    temperature: float = TEMPERATURE,
    variant: str = "out",
    push: float = 0.0,
    push_above: float = PUSH_ABOVE,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`simreg.simreg_loss` of rows whose tokens are spread over a process group.

    Every rank of the groups must call, and call backward; the loss and the gradients are those of
    one process that holds whole rows. Where there is a row for every rank, each computes whole
    rows; else embeddings travel to the ranks that need them, in chunks, while others are computed
    with (see docs/parallel.md for bytes and memory).

    Args:
        hidden: ``[B, l, d]`` or ``[l, d]``: this rank's tokens of the same B rows; l may differ
            from rank to rank, and be 0. Or a DTensor, whose placements then give the groups:
            sharded along the tokens, `group`; replicated, `replicas`.
        labels: ``[B, l]`` or ``[l]`` int64, already shifted (before sharding). Beside a DTensor: a
            DTensor, or a plain tensor in the shape of the whole or of the local part; so too
            `segments` and `positions`.
        group: over which tokens are spread (context or sequence parallelism). None: they are not.
        replicas: whose ranks hold the same tokens (tensor parallelism). They share the work; the
            result and the gradient are the same, and whole, on each. Must not overlap with `group`.
        positions: ``[l]`` or ``[B, l]`` integer, of each token in its row. Only `chunk_size` reads
            them. None: the ranks of `group` hold consecutive parts.
        segments, temperature, variant, push, push_above, chunk_size, ignore_index: as in
            `simreg_loss`.
        reduction: this rank's part of the loss, for the ranks of `group` to add up: ``"sum"`` over
            its tokens; ``"mean"``, that over the number of valid labels of all its ranks;
            ``"none"``: per token, in the shape of its ``labels``.

    Returns:
        As `simreg_loss`, a plain tensor.

    Raises:
        ValueError: as `simreg_loss`; on all ranks if arguments are wrong on one or do not agree
            (of groups: on those that share another with it).
        RuntimeError: for double backward and transforms of `torch.func`.
    """
    found: Found = per_token(
        hidden,
        labels,
        segments,
        positions,
        form=Form(temperature, variant, push, push_above),
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        group=group,
        replicas=replicas,
        reduction=reduction,
    )
    if reduction == "none":
        return found.loss
    total = found.loss.sum()
    return total if reduction == "sum" else total / found.labelled.clamp_min(1)


class ShardedSimRegLoss(SimRegLoss):
    """`simreg.SimRegLoss` of rows whose tokens, or the work on them, are spread over processes.

    There is no backend to choose: its attribute `backend` is not read.

    Args:
        weight, temperature, variant, chunk_size, ignore_index, push, push_above: as in
            `SimRegLoss`.
        group, replicas: as in `sharded_simreg_loss`.

    Raises:
        ValueError: for an option of no meaning.
    """

    def __init__(
        self,
        weight: float = WEIGHT,
        *,
        temperature: float = TEMPERATURE,
        variant: str = "out",
        chunk_size: int | None = None,
        ignore_index: int = -100,
        push: float = PUSH,
        push_above: float = PUSH_ABOVE,
        group: dist.ProcessGroup | None = None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            weight,
            temperature=temperature,
            variant=variant,
            chunk_size=chunk_size,
            ignore_index=ignore_index,
            push=push,
            push_above=push_above,
        )
        self.group, self.replicas = group, replicas

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedSimRegLoss":
        """A copy in the same process groups, which can't be copied."""
        memo |= {id(group): group for group in (self.group, self.replicas)}
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def refuse(self, device: torch.device | str = "cpu") -> None:
        """Instead of a call: tell the ranks that wait in theirs, which raise a ValueError.

        `device` is one that the ranks can communicate on.
        """
        with contextlib.suppress(ValueError):
            agree(Peers(self.group), Peers(self.replicas), Header(), torch.device(device))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the weighted loss, and metrics of its tokens.

        Args:
            hidden, labels, segments, positions: as in `sharded_simreg_loss`.
            num_items: the divisor of the summed loss; None: the valid labels of all ranks of
                `group`. Where gradients are averaged over ranks, the labels of all of these by
                their number.

        Returns:
            As `SimRegLoss`; the parts of the ranks of `group` add up to its loss.

        Raises:
            ValueError: as `SimRegLoss` and `sharded_simreg_loss`, on every rank.
        """
        found: Found = per_token(
            hidden.detach() if self.weight == 0 else hidden,
            labels,
            segments,
            positions,
            form=self.form,
            chunk_size=self.chunk_size,
            ignore_index=self.ignore_index,
            group=self.group,
            replicas=self.replicas,
            num_items=num_items,
            weight=self.weight,
        )
        divisor = found.labelled.clamp_min(1) if num_items is None else num_items
        return weigh(self.weight, Sums.of(*found[:4]), divisor)


class Found(NamedTuple):
    """Of this rank's tokens, in the shape of its labels; labelled: valid tokens of all ranks."""

    loss: Tensor
    pos_cos: Tensor
    neg_cos: Tensor
    valid: Tensor
    labelled: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def per_token(
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    form: Form,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    replicas: dist.ProcessGroup | None = None,
    reduction: str = "none",
    num_items: Tensor | float | None = None,
    weight: float | None = None,
    whole_rows: bool = True,
) -> Found:
    """As `simreg.loss.per_token`, of arguments as `sharded_simreg_loss` takes them.

    What becomes of the losses, `reduction`, `num_items` (a tensor's value is not read) and λ
    (`weight`), is only compared with the other ranks. `whole_rows`: whether ranks may deal out
    whole rows if there are enough.
    """
    how = placing(hidden, group, replicas)
    local = whole_along_d(hidden, how)
    settings = form, chunk_size, ignore_index, reduction, num_items, weight
    own, error, device = Header(), None, _device(local, labels)
    try:
        parts = local_parts(hidden, local, labels, segments, positions, how)
        if how.error is not None:
            raise how.error
        labels, segments, positions = parts
        copied = how.copies.group is not None
        own = _checked(local, labels, segments, positions, settings, copied, how.peers.rank)
        own = own._replace(rest=f"group {how.peers.size}, replicas {how.copies.size}, {own.rest}")
    except Exception as refused:  # of any kind: the others must hear of it
        error = refused
    try:
        lengths = agree(how.peers, how.copies, own, device)
    except ValueError:
        if error is not None:
            raise error from None
        raise

    hidden = local
    valid = labelled(labels, ignore_index)
    if max(lengths) == 0 or 0 in hidden.shape[:-2]:  # of no rank any token
        nothing = hidden.sum(-1).to(wide(hidden.dtype))
        return Found(nothing, nothing.detach(), nothing.detach(), valid, valid.sum())
    scopes = [] if segments is None else [segments.long()]
    at_home = False  # whether chunks end with the shards, so that ranks have nothing to exchange
    if chunk_size is not None:
        if positions is None:
            at_home = len(set(lengths)) == 1 and lengths[0] % chunk_size == 0
            first = sum(lengths[: how.peers.rank])
            positions = torch.arange(first, first + labels.shape[-1], device=device)
        size = min(chunk_size, torch.iinfo(torch.int64).max)
        chunks = positions.long().div(size, rounding_mode="floor")
        scopes.append(chunks.expand_as(labels))
    row = labels.masked_fill(~valid, -1), *scopes
    if hidden.ndim == 2:
        hidden, row = hidden[None], tuple(keys[None] for keys in row)
    peers = Peers(None) if at_home else how.peers
    kind = WholeRows if whole_rows and WholeRows.suffice(len(hidden), peers, how.copies) else Shards
    way = kind(row[0], list(row[1:]), lengths, peers, how.copies)
    results = _Loss.apply(hidden, way, form)  # type: ignore[no-untyped-call]
    loss, pos_cos, neg_cos = (result.view(labels.shape) for result in results)
    everywhere = how.peers.gather(way.count).sum() if at_home else way.count
    return Found(loss, pos_cos, neg_cos, valid, everywhere)


def _device(*tensors: object) -> torch.device:
    """On which ranks can communicate, even if some argument is no tensor."""
    found = [value.device for value in tensors if isinstance(value, Tensor)]
    return found[0] if found else torch.device("cpu")


def _checked(
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    positions: Tensor | None,
    settings: tuple[Form, int | None, int, str, Tensor | float | None, float | None],
    copied: bool,
    rank: int,
) -> Header:
    """What the other ranks must know of arguments that make sense here."""
    form, chunk_size, ignore_index, reduction, num_items, weight = settings
    check_options(form, chunk_size, "auto")
    check_ignore_index(ignore_index)
    check_items(num_items)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    check_tensors(hidden, labels, segments)
    check_transforms(hidden, labels, segments)
    _check_positions(positions, labels)
    common = {
        "rows": 1 if hidden.ndim == 2 else len(hidden),
        "d": hidden.shape[-1],
        "dtype": hidden.dtype,
        "requires_grad": hidden.requires_grad and torch.is_grad_enabled(),
        "segments given": segments is not None,
        "positions given": positions is not None,
        "temperature": float(form.temperature),
        "variant": form.variant,
        "push": float(form.push),
        "push_above": float(form.push_above),
        "chunk_size": chunk_size,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "num_items": _told(num_items),
        "weight": weight if weight is None else float(weight),
    }
    places = positions
    if positions is None and chunk_size is not None:  # they follow from the place in `group`
        places = torch.tensor([rank], device=labels.device)
    return Header(
        good=True,
        length=labels.shape[-1],
        tokens=_checksum(labels, segments, places) if copied else 0,
        rest=", ".join(f"{name} {value}" for name, value in common.items()),
    )


def _told(num_items: Tensor | float | None) -> str:
    if isinstance(num_items, Tensor):
        return "in a tensor"
    return str(num_items if num_items is None else float(num_items))


def _checksum(labels: Tensor, *others: Tensor | None) -> int:
    parts = torch.cat([labels.flatten(), *(x.flatten() for x in others if x is not None)])
    return int((parts * torch.arange(1, parts.numel() + 1, device=parts.device)).sum())


def _check_positions(positions: Tensor | None, labels: Tensor) -> None:
    if positions is None:
        return
    if not isinstance(positions, Tensor) or positions.dtype not in INTEGERS:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"positions: expected a tensor of integers, got {got}")
    if positions.shape not in (labels.shape, labels.shape[-1:]):
        raise ValueError(
            f"positions: expected {list(labels.shape)} or {list(labels.shape[-1:])} to go with "
            f"labels, got {list(positions.shape)}"
        )
    if positions.device != labels.device:
        raise ValueError(
            f"positions: expected on {labels.device} like labels, got {positions.device}"
        )


class _Loss(torch.autograd.Function):
    """Per-token loss and mean cosines ``[B, l]`` of this rank's hidden states ``[B, l, d]``."""

    @staticmethod
    def forward(ctx, hidden, way, form):  # type: ignore[no-untyped-def]
        outputs, saved = way.forward(hidden, form)
        ctx.save_for_backward(hidden, *saved)
        ctx.way, ctx.form = way, form
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
        gradient = _Gradient.apply(grad, ctx.way, ctx.form, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return gradient, None, None


class _Gradient(torch.autograd.Function):
    """dL/dhidden ``[B, l, d]`` from dL/dloss ``[B, l]``; a function of its own to refuse more."""

    @staticmethod
    def forward(ctx, grad, way, form, hidden, *saved):  # type: ignore[no-untyped-def]
        return way.backward(grad, hidden, saved, form)

    @staticmethod
    def backward(ctx, *unused):  # type: ignore[no-untyped-def]
        raise RuntimeError("sharded_simreg_loss: double backward is not supported")
