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

from simreg.depths import AtDepths, offsets_at
from simreg.integrations.following import Following
from simreg.integrations.torchtitan.layers import Layers
from simreg.integrations.torchtitan.rows import Rows, documents_of
from simreg.loss import PUSH, PUSH_ABOVE, TEMPERATURE, WEIGHT, SimRegLoss, Sums, Variant, per_token
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

        variant: Variant = "out"
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

        depths_offset: int | list[int] | None = None
        """The label they are compared by there, all of them or (a list) each: 0, the next token; 1,
        the one after it; −2, the one before. None: −2 up to depth 0.25, 1 beyond."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        simreg, schedule = checked(config)
        super().__init__(config, compile_config=compile_config)
        self.simreg, self.scope = simreg, config.scope
        self.offsets = offsets_at(config.depths, config.depths_offset) if config.depths else ()
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
            sums = _simreg(self.simreg, _local(pred, tp), ids, rows, tp, cp)
            earlier = sums.loss.new_zeros(())
            if self._layers and self.simreg.weight == 0:
                self._layers.forget()
            elif self._layers:
                within = rows.within
                if within is None:
                    within = tuple(labels_at(ids, rows.documents, at) for at in self.offsets)
                for states, by in zip(self._layers.take(pred, tp), within, strict=True):
                    earlier = earlier + _simreg(self.simreg, states, by, rows, tp, cp).loss
            self.totals.add(_plain(ce), sums, earlier)
            if self.simreg.weight == 0:
                return ce, metrics
            loss = ce + _like(ce, self.simreg.weight * (sums.loss + earlier) / divisor)
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, metrics

    def _whole_rows(self, positions: Tensor | None) -> Rows:
        if self.scope == "row":
            return Rows()
        return Rows(documents_of(None if positions is None else _plain(positions)))


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

    def add(self, ce: Tensor, sums: Sums, earlier: Tensor) -> None:
        """Add a batch: its cross-entropy over the global valid tokens, SimReg's sums, and its
        loss of hidden states within the model."""
        if self.sums is None:
            self.sums = torch.zeros(8, dtype=torch.float64, device=ce.device)
        batch = ce.reshape(()), *sums, earlier
        self.sums += torch.stack([value.detach().double() for value in batch])
        self.batches += 1

    def reset(self) -> None:
        """Start again from 0."""
        self.batches = 0
        if self.sums is not None:
            self.sums.zero_()


def metrics_of(sums: Tensor, depths: int = 0) -> dict[str, float]:
    """Totals that were added up over ranks, as metrics: of `SimRegLoss` (with so many depths, of
    `AtDepths`), and `ce`."""
    ce, *own, earlier = sums.cpu()
    found = Sums(*own)
    metrics = {"ce": ce, **found.means()}
    if depths:
        metrics["earlier"] = earlier / depths / found.tokens.clamp_min(1)
    return {name: value.item() for name, value in metrics.items()}


def _simreg(
    simreg: SimRegLoss,
    hidden: Tensor,
    labels: Tensor,
    rows: Rows,
    tp: ProcessGroup | None,
    cp: ProcessGroup | None,
) -> Sums:
    """Of this rank's tokens."""
    if simreg.weight == 0:
        hidden = hidden.detach()
    given = hidden, labels, rows.documents
    options: dict[str, Any] = {
        "form": simreg.form,
        "chunk_size": simreg.chunk_size,
        "ignore_index": simreg.ignore_index,
    }
    if tp is None and cp is None:
        return Sums.of(*per_token(*given, **options, backend=simreg.backend, summed=True))
    # the ranks of tp hold the same tokens and share the work
    spread = parallel.per_token(*given, rows.places, **options, group=cp, replicas=tp)
    return Sums.of(*spread[:4])


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
