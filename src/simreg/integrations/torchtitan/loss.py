"""Cross-entropy in chunks, as torchtitan has it, plus SimReg over the whole rows."""

from dataclasses import dataclass, field
from typing import Any, Literal

import spmd_types as spmd
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.parallel_dims import ParallelDims

from simreg.depths import OFFSET, AtDepths
from simreg.integrations.following import Following
from simreg.integrations.torchtitan.layers import Layers
from simreg.integrations.torchtitan.rows import Rows, documents_of
from simreg.loss import PUSH, PUSH_ABOVE, TEMPERATURE, WEIGHT, SimRegLoss, per_token
from simreg.objectives import labels_at
from simreg.parallel import loss as parallel
from simreg.schedule import SCHEDULE, Schedule, ScheduleName


class ChunkedSimRegLoss(ChunkedLossWrapper):
    """`ChunkedLossWrapper` plus weight × SimReg of the hidden states that it is given.

    Both terms are sums over tokens divided by `global_valid_tokens`, so micro-batches, pipeline
    micro-batches and ranks add up. SimReg sees whole rows `[B, L, D]`, not the chunks of the
    cross-entropy. Without gradient (validation) the loss is cross-entropy alone.

    Run by `SimRegTrainer`, which calls `bind` and, where tokens are spread over ranks or stages,
    `expect`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """Those of `ChunkedLossWrapper`, and SimReg's."""

        weight: float = WEIGHT
        """λ of SimReg; 0 leaves cross-entropy, and the metrics of the final hidden states are
        still computed."""

        temperature: float = TEMPERATURE
        """τ of SimReg."""

        variant: Literal["out", "in", "decoupled"] = "out"
        """Form of SimReg."""

        chunk_size: int | None = None
        """Compare only tokens within so many positions of the row (num_chunks is another thing:
        the chunks in which cross-entropy is computed)."""

        push: float = PUSH
        """Weight of the push beside SimReg; both times λ."""

        push_above: float = PUSH_ABOVE
        """Cosine above which pairs are pushed apart."""

        scope: Literal["row", "document"] = "row"
        """Compare tokens of the whole row, or of one of the documents packed into it."""

        schedule: ScheduleName = SCHEDULE
        """How λ changes over the run, from `weight`: as in `simreg.schedule.Schedule`."""

        schedule_fraction: float | None = None
        """Share of the steps that `schedule` speaks of; None: all for "decay", else half."""

        depths: list[float] = field(default_factory=list)
        """Where else to have the same loss, as fractions of the depth (`simreg.AtDepths`): 0.5,
        the middle layer. Not with pipeline parallelism."""

        depths_offset: int = OFFSET
        """The label they are compared by there: 0, the next token; 1, the one after it."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        simreg, schedule = checked(config)
        super().__init__(config, compile_config=compile_config)
        self.simreg, self.scope, self.depths_offset = simreg, config.scope, config.depths_offset
        self.following = Following(self.simreg, schedule)
        self.totals = Totals()
        self._dims: ParallelDims | None = None
        self._layers: Layers | None = None
        self._rows = WeakTensorKeyDictionary()

    def bind(self, dims: ParallelDims, layers: Layers | None = None) -> None:
        """Say how the job is parallel, and where hidden states within the model are. Required
        before the first call."""
        self._dims, self._layers = dims, layers

    def expect(self, labels: Tensor, rows: Rows) -> None:
        """Say where the tokens of a batch belong that will come with `labels`, this very tensor."""
        self._rows[labels] = rows

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of hidden states `pred` `[B, L, D]`, and the metrics of the cross-entropy.

        Raises:
            RuntimeError: before `bind`.
            ValueError: documents are wanted and the data has no positions.
        """
        ce, metrics = super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        if not pred.requires_grad:
            return ce, metrics
        if self._dims is None:
            raise RuntimeError("loss: ChunkedSimRegLoss is run by SimRegTrainer: see with_simreg")
        rows = self._rows.get(labels)  # type: ignore[no-untyped-call]
        if rows is None:
            if self._dims.pp_enabled:  # the schedule infers shapes, with hidden states of garbage
                return ce, metrics
            rows = self._whole_rows(loss_inputs.get("positions"))
        divisor = 1 if global_valid_tokens is None else global_valid_tokens
        with spmd.no_typecheck():
            tp, cp = _group(self._dims, "tp"), _group(self._dims, "cp")
            ids = _plain(labels)
            summed, sums = _simreg(self.simreg, _local(pred, tp), ids, rows, tp, cp)
            earlier = summed.new_zeros(())
            if self._layers and self.simreg.weight == 0:
                self._layers.forget()
            elif self._layers:
                within = rows.within
                if within is None:
                    within = labels_at(ids, rows.documents, self.depths_offset)
                for states in self._layers.take(pred, tp):
                    earlier = earlier + _simreg(self.simreg, states, within, rows, tp, cp)[0]
            self.totals.add(_plain(ce.detach()), sums, earlier.detach())
            if self.simreg.weight == 0:
                return ce, metrics
            summed = summed + earlier
            loss = ce + _like(ce, self.simreg.weight * summed / divisor)
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, metrics

    def _whole_rows(self, positions: Tensor | None) -> Rows:
        if self.scope == "row":
            return Rows()
        if positions is None:
            raise ValueError("loss.scope: 'document' needs a dataloader that gives positions")
        return Rows(documents_of(_plain(positions)))


def checked(config: ChunkedSimRegLoss.Config) -> tuple[SimRegLoss, Schedule]:
    """What a config asks for; ValueError for an option of no meaning."""
    if config.scope not in ("row", "document"):
        raise ValueError(f"loss.scope: expected 'row' or 'document', got {config.scope!r}")
    simreg = SimRegLoss(
        config.weight,
        temperature=config.temperature,
        variant=config.variant,
        chunk_size=config.chunk_size,
        push=config.push,
        push_above=config.push_above,
    )
    if config.depths:
        AtDepths(simreg, config.depths, offset=config.depths_offset)  # for its errors
    return simreg, Schedule(config.schedule, config.schedule_fraction)


class Totals:
    """Sums of cross-entropy and of SimReg's metrics since the last reset, on the device.

    One buffer, changed in place: a CUDA graph that was captured goes on adding to it.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.batches = 0

    def add(self, ce: Tensor, sums: Tensor, earlier: Tensor) -> None:
        """Add a batch: its cross-entropy over the global valid tokens, `_simreg`'s sums, and its
        loss of hidden states within the model."""
        if self.sums is None:
            self.sums = torch.zeros(8, dtype=torch.float64, device=sums.device)
        self.sums += torch.cat([ce.double().reshape(1), sums, earlier.double().reshape(1)])
        self.batches += 1

    def reset(self) -> None:
        """Start again from 0."""
        self.batches = 0
        if self.sums is not None:
            self.sums.zero_()


def metrics_of(sums: list[float], depths: int = 0) -> dict[str, float]:
    """Totals that were added up over ranks, as metrics: of `SimRegLoss` (with so many depths, of
    `AtDepths`), and `ce`."""
    ce, valid, loss, positives, pos_cos, negatives, neg_cos, earlier = sums
    metrics = {
        "ce": ce,
        "loss": loss / max(valid, 1),
        "pos_fraction": positives / max(valid, 1),
        "pos_cos": pos_cos / max(positives, 1),
        "neg_fraction": negatives / max(valid, 1),
        "neg_cos": neg_cos / max(negatives, 1),
    }
    if depths:
        metrics["earlier"] = earlier / depths / max(valid, 1)
    return metrics


def _simreg(
    simreg: SimRegLoss,
    hidden: Tensor,
    labels: Tensor,
    rows: Rows,
    tp: ProcessGroup | None,
    cp: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Σ_i ℓ_i of this rank's tokens, and detached sums: valid, loss, positives, their cosines,
    negatives, theirs."""
    if simreg.weight == 0:
        hidden = hidden.detach()
    options = simreg.form, simreg.chunk_size, simreg.ignore_index
    if tp is None and cp is None:
        found = per_token(hidden, labels, rows.documents, *options, simreg.backend, summed=True)
    else:  # the ranks of tp hold the same tokens and share the work
        found = parallel.per_token(hidden, labels, rows.documents, rows.places, *options, cp, tp)
    loss, pos_cos, neg_cos, valid = found[:4]
    total, pos, neg = loss.sum(), ~pos_cos.isnan(), ~neg_cos.isnan()
    sums = [valid.sum(), total.detach(), pos.sum(), pos_cos.nansum(), neg.sum(), neg_cos.nansum()]
    return total, torch.stack([value.double() for value in sums])


def _local(pred: Tensor, tp: ProcessGroup | None) -> Tensor:
    """Hidden states `[B, l, D]` as a plain tensor.

    Tensor parallelism replicates them, and every rank gets the whole gradient: it must count
    once. A DTensor knows that; the spmd_types backend holds plain tensors whose gradients are
    partial sums over the ranks, so there the gradient enters as such.
    """
    if isinstance(pred, DTensor):
        return pred.to_local()
    if tp is None:
        return pred
    local: Tensor = spmd.convert(pred, tp, src=spmd.R, dst=spmd.I, expert_mode=True)
    return local


def _plain(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _like(ce: Tensor, value: Tensor) -> Tensor:
    """A local value that adds up over ranks as `ce` does, to be added to it."""
    if not isinstance(ce, DTensor):
        return value
    return DTensor.from_local(value, ce.device_mesh, ce.placements, run_check=False)


def _group(dims: ParallelDims, name: str) -> ProcessGroup | None:
    mesh = dims.get_optional_mesh(name)
    return None if mesh is None else mesh.get_group()
