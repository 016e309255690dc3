"""torchtitan's trainer with the SimReg loss, and configs turned into its configs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from simreg.depths import layers_within, offsets_at
from simreg.integrations.torchtitan.layers import Layers
from simreg.integrations.torchtitan.loss import ChunkedSimRegLoss, checked, metrics_of
from simreg.integrations.torchtitan.rows import Rows, documents_of, places_of, shard
from simreg.objectives import labels_at


class SimRegTrainer(Trainer):
    """`Trainer` for a `ChunkedSimRegLoss`: tells it where tokens belong, logs what it did.

    Metrics, over the global batch of the step: `simreg/ce`, `simreg/loss` (per valid token, without
    the weight), `simreg/pos_fraction`, `simreg/pos_cos`, `simreg/neg_fraction`, `simreg/neg_cos`,
    with `loss.depths` `simreg/earlier` (the mean of `loss` there), and `simreg/weight`, beside
    torchtitan's own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """That of `Trainer`, with a `ChunkedSimRegLoss.Config` for its loss."""

    config: Config
    loss_fn: ChunkedSimRegLoss
    simreg_metrics: dict[str, float]

    def __init__(self, config: Config) -> None:
        if not isinstance(config.loss, ChunkedSimRegLoss.Config):
            raise ValueError(
                f"loss: expected a ChunkedSimRegLoss.Config, got {type(config.loss).__qualname__}"
            )
        checked(config.loss)  # here, and not when all else is built
        degrees = config.parallelism
        spread = max(degrees.context_parallel_degree, degrees.tensor_parallel_degree) > 1
        if (spread or config.loss.depths) and not config.training.disable_cuda_graphs:
            raise ValueError(
                "training.disable_cuda_graphs: expected True with loss.depths, which no graph was "
                "tried with, and with context or tensor parallelism, whose ranks agree on the host "
                "what to send"
            )
        scheduled = config.loss.weight > 0 and config.loss.schedule != "constant"
        if scheduled and not config.training.disable_cuda_graphs:
            raise ValueError(
                "training.disable_cuda_graphs: expected True unless loss.schedule is 'constant': a "
                "graph would keep the first step's weight"
            )
        depths = config.loss.depths
        if depths:
            _check_depths(config)
        super().__init__(config)
        self.simreg_metrics = {}
        layers = Layers(self.model_parts[0], depths) if depths else None
        self.loss_fn.bind(self.parallel_dims, layers)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As torchtitan; before tokens are spread, notes where they belong."""
        spread = self.parallel_dims.pp_enabled or self.parallel_dims.cp_enabled
        rows = self._rows(input_dict.get("positions"), labels) if spread else None
        inputs, labels, others = super().post_dataloading_process(input_dict, labels)
        if rows is not None:
            self.loss_fn.expect(labels, rows)
        return inputs, labels, others

    def _rows(self, positions: Tensor | None, labels: Tensor) -> Rows:
        documents = documents_of(positions) if self.loss_fn.scope == "document" else None
        if not self.parallel_dims.cp_enabled:
            return Rows(documents)
        chosen = self.config.loss
        offsets = offsets_at(chosen.depths, chosen.depths_offset) if chosen.depths else ()
        rows = Rows(
            documents,
            None if chosen.chunk_size is None else places_of(labels),
            tuple(labels_at(labels, documents, at) for at in offsets) if any(offsets) else None,
        )
        balancer = self.config.parallelism.context_parallel_load_balancer
        return shard(rows, self.parallel_dims.get_mesh("cp"), balancer)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """As torchtitan, with the λ of this step; then logs SimReg's metrics.

        Raises:
            RuntimeError: a pipeline schedule gave the loss other labels than the trainer gave it.
        """
        self.loss_fn.following.at((self.step - 1) / self.config.training.steps)
        super().train_step(data_iterator)
        if self.parallel_dims.pp_enabled and self.pp_has_last_stage:
            wanted = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
            if self.loss_fn.totals.batches != wanted:
                raise RuntimeError(
                    f"loss: expected SimReg of {wanted} micro-batches, got "
                    f"{self.loss_fn.totals.batches}: does the pipeline schedule copy labels?"
                )
        if self.metrics_processor.should_log(self.step):
            self._log()
        self.loss_fn.totals.reset()

    def _log(self) -> None:
        sums = self.loss_fn.totals.sums
        if self.parallel_dims.pp_enabled and not self.pp_has_last_stage:
            return
        assert sums is not None
        if self.parallel_dims.dp_cp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            sums = dist_utils.dist_sum_tensor(sums, mesh)
        self.simreg_metrics = metrics_of(sums, self._depths())
        named = {f"simreg/{name}": value for name, value in self.simreg_metrics.items()}
        named["simreg/weight"] = self.loss_fn.simreg.weight
        self.metrics_processor.logger.log(named, self.step)
        logger.info("  ".join(f"{name}: {value:.5f}" for name, value in named.items()))

    def _depths(self) -> int:
        """How many were computed in this step: at λ = 0 none."""
        return len(self.config.loss.depths) if self.loss_fn.simreg.weight else 0


def _check_depths(config: SimRegTrainer.Config) -> None:
    if config.parallelism.pipeline_parallel_degree > 1:
        raise ValueError(
            "loss.depths: not with pipeline parallelism, where labels are on the last stage"
        )
    # Each token of a row has a label here, and one token alone is not compared.
    offsets = offsets_at(config.loss.depths, config.loss.depths_offset)
    if max(map(abs, offsets)) + 2 > config.training.seq_len:
        raise ValueError(
            f"loss.depths_offset: {config.loss.depths_offset} leaves no two tokens to compare in "
            f"rows of training.seq_len={config.training.seq_len} tokens"
        )
    layers = getattr(config.model_spec.model, "layers", None)
    if not isinstance(layers, Sequence):
        raise ValueError("loss.depths: the model has no list of layers")
    try:
        layers_within(config.loss.depths, len(layers))
    except ValueError as error:
        raise ValueError(f"loss.{error}") from None


def with_simreg(config: Trainer.Config, **options: Any) -> SimRegTrainer.Config:
    """A torchtitan config with SimReg added to its chunked loss.

    `options` are those of `ChunkedSimRegLoss.Config`: weight, temperature, variant, push,
    push_above, chunk_size, scope, schedule, schedule_fraction, depths, depths_offset. CUDA graphs
    are switched off: this loss was not tried in one.

    Raises:
        ValueError: an option of no meaning, or the loss is not a `ChunkedLossWrapper.Config`
            (others never see hidden states), or the trainer is a subclass of `Trainer` that is not
            one of `SimRegTrainer`.
    """
    if not isinstance(config, Trainer.Config):
        raise ValueError(f"config: expected a Trainer.Config, got {type(config).__qualname__}")
    chunked = config.loss
    if type(chunked) is not ChunkedLossWrapper.Config:
        raise ValueError(
            f"loss: expected a ChunkedLossWrapper.Config, got {type(chunked).__qualname__}"
        )
    loss = ChunkedSimRegLoss.Config(**_fields(chunked), **options)
    checked(loss)  # here, and not first on every rank
    if type(config) is Trainer.Config:
        config = SimRegTrainer.Config(**_fields(config))
    if not isinstance(config, SimRegTrainer.Config):
        raise ValueError(
            f"config: expected a Trainer.Config, got {type(config).__qualname__}: derive the "
            "trainer from SimRegTrainer"
        )
    config.loss = loss
    config.training = replace(config.training, disable_cuda_graphs=True)
    return config


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}
