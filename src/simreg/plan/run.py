"""`simreg plan`: what the loss costs on a cluster, and which setting costs little enough."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from simreg.depths import default_depths, layers_within
from simreg.loss import Variant
from simreg.plan import costs, models
from simreg.plan.advice import Option, options, within
from simreg.plan.costs import Job, Setting
from simreg.plan.models import Model
from simreg.plan.table import cells, columns, grid, name, percent, si, size
from simreg.recipe.errors import UserError


@dataclass
class PlanOptions:
    """What SimReg adds to the FLOPs, memory and communication of a training step, by formulas.

    Nothing is run: docs/plan.md derives the formulas and says what they leave out. All figures are
    of one rank that holds the LM head, for one forward and backward pass over its rows.
    """

    model: str | None = None
    """A preset, such as llama-130m, llama-8b, llama-70b, mixtral-8x7b; for another model
    --params, --hidden and --layers."""
    params: float | None = None
    """All parameters, such as 8e9."""
    active_params: float | None = None
    """Those that a token is multiplied with (mixture of experts); default: all."""
    hidden: int | None = None
    """The width d of the hidden states."""
    layers: int | None = None
    """Transformer layers."""
    kv_width: int | None = None
    """With --params, the width of all keys of a token: heads of keys times their dimension.
    Default: --hidden, as where each head has its own."""
    seq: Annotated[int, tyro.conf.arg(aliases=("--seq-len",))] = 8192
    """Tokens of a row."""
    rows: int = 1
    """Rows of each data-parallel rank in a pass (the micro-batch)."""
    document: int | None = None
    """Tokens of a packed document; those of others are neither attended to nor compared."""
    gpus: int = 1
    """Of the whole cluster; what tp, cp and pp leave is data parallelism. FSDP shards all."""
    tp: int = 1
    """Tensor parallelism."""
    cp: int = 1
    """Context parallelism."""
    pp: int = 1
    """Pipeline parallelism."""
    depths: list[float] | None = None
    """Where else in the model the loss is, as fractions of its depth; without a value
    nowhere. Default: as in `simreg train`, but with pp, which cannot."""
    variant: Variant = "out"
    """Of the loss."""
    chunk: Annotated[int | None, tyro.conf.arg(aliases=("--chunk-size",))] = None
    """Compare tokens within chunks of so many; default: whole rows."""
    bound: float = 0.01
    """Advise the widest setting that adds at most this fraction of the step's time."""
    tflops: float = 400.0
    """10^12 FLOP/s that a rank achieves, in the model and in the loss alike."""
    link: float = 50.0
    """10^9 bytes/s that a rank receives: 50 is a link of 400 Gbit/s for each GPU."""
    table: bool = False
    """Print the table of docs/plan.md instead: five models, 1 to 4,096 GPUs, 2k to 1M tokens."""


def main(chosen: PlanOptions) -> None:
    """Run the command; UserError for options that cannot be met."""
    _check_positive(chosen, "bound", "tflops", "link")
    rate = {"tflops": chosen.tflops, "link": chosen.link}
    if chosen.table:
        _check_no_others(chosen)
        lines = grid(bound=chosen.bound, **rate)
    else:
        lines = _report(chosen, rate)
    print("\n".join(lines))


def _check_no_others(chosen: PlanOptions) -> None:
    for field in fields(chosen):
        if field.name in ("table", "bound", "tflops", "link"):
            continue
        if getattr(chosen, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise UserError(f"--{flag}: the table of --table has models and clusters of its own")


def _report(chosen: PlanOptions, rate: dict[str, float]) -> Iterator[str]:
    job = _job(chosen)
    setting = Setting(chosen.variant, chosen.chunk)
    yield from _situation(job)
    yield ""
    yield from _costs(job, setting, costs.shares(job, setting, **rate))
    yield ""
    yield from _advice(job, chosen.variant, options(job, chosen.variant, **rate), chosen.bound)


def _check_positive(chosen: PlanOptions, *names: str) -> None:
    for field in names:
        value = getattr(chosen, field)
        if value is not None and not 0 < value < math.inf:
            flag = field.replace("_", "-")
            raise UserError(f"--{flag}: expected a positive, finite number, got {value}")


def _job(chosen: PlanOptions) -> Job:
    _check_positive(chosen, "seq", "rows", "document", "gpus", "tp", "cp", "pp", "chunk")
    if chosen.chunk == 1:
        raise UserError("--chunk: expected 2 or more, a token alone is not compared")
    if chosen.gpus % (ranks := chosen.tp * chosen.cp * chosen.pp):
        raise UserError(f"--gpus: {chosen.gpus} is not a multiple of tp × cp × pp = {ranks}")
    if chosen.seq % chosen.cp:
        raise UserError(f"--seq: {chosen.seq} is not a multiple of --cp {chosen.cp}")
    model = _model(chosen)
    depths = chosen.depths
    if depths is None:
        depths = default_depths(model.layers) if chosen.pp == 1 else []
    if depths and chosen.pp > 1:
        raise UserError("--depths: layers within the model have the loss only without pp")
    if not all(0 < depth < 1 for depth in depths):
        raise UserError(f"--depths: expected fractions between 0 and 1, got {depths}")
    try:
        layers_within(depths, model.layers)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if chosen.pp > model.layers:
        raise UserError(f"--pp: {chosen.pp} stages are more than the {model.layers} layers")
    return Job(
        model,
        length=chosen.seq,
        rows=chosen.rows,
        gpus=chosen.gpus,
        tp=chosen.tp,
        cp=chosen.cp,
        pp=chosen.pp,
        document=chosen.document,
        within=len(depths),
    )


def _model(chosen: PlanOptions) -> Model:
    params, hidden, layers = chosen.params, chosen.hidden, chosen.layers
    active = params if chosen.active_params is None else chosen.active_params
    if chosen.model is not None:
        if (params, active, hidden, layers, chosen.kv_width) != (None,) * 5:
            raise UserError("--model: give a preset, or --params, --hidden and --layers; not both")
        return models.find(chosen.model)
    if params is None or active is None or hidden is None or layers is None:
        raise UserError("give --model, such as llama-8b, or all of --params, --hidden and --layers")
    _check_positive(chosen, "params", "active_params", "hidden", "layers")
    for flag, number in (("params", params), ("active-params", active)):
        if number < 1:
            raise UserError(
                f"--{flag}: expected a number of parameters, such as 8e9; got {number:g}"
            )
        if number < layers * hidden**2:  # less than a projection of the hidden states a layer
            raise UserError(
                f"--{flag}: {number:g} are too few for {layers} layers of width {hidden}: is an "
                "exponent missing, as of 8e9?"
            )
    if active > params:
        raise UserError(f"--active-params: expected at most --params, got {active:g}")
    keys = hidden if chosen.kv_width is None else chosen.kv_width
    if not 1 <= keys <= hidden:
        raise UserError(f"--kv-width: expected from 1 to --hidden, {hidden}; got {keys}")
    return Model("your model", hidden, layers, int(params), int(active), keys=keys)


def _situation(job: Job) -> Iterator[str]:
    model, data = job.model, job.gpus // (job.tp * job.cp * job.pp)
    yield (
        f"{model.name}: {si(model.parameters)} parameters, {si(model.multiplied)} multiplied with "
        f"a token, d {model.hidden:,}, {_counted(model.layers, 'layer')}"
    )
    documents = f" (documents of {job.document:,})" if job.document else ""
    yield (
        f"{_counted(job.gpus, 'GPU')} = data {data:,} × tp {job.tp} × cp {job.cp} × pp {job.pp}; "
        f"{job.rows} × {job.length:,} tokens{documents} for {_counted(job.cp * job.tp, 'rank')} "
        "in a pass"
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _costs(job: Job, setting: Setting, shares: costs.Shares) -> Iterator[str]:
    traffic = costs.model_traffic(job)
    flops, received = costs.loss_flops(job, setting), costs.loss_traffic(job, setting)
    rows = (
        ("FLOPs", si, flops.total, costs.model_flops(job), shares.flops),
        ("memory", size, costs.loss_memory(job, setting), costs.model_memory(job), shares.memory),
        ("received", size, received.total, sum(traffic), shares.received),
    )
    yield f"{'a rank, a pass':<16}{'SimReg':>12}{'the model':>12}{'share':>10}"
    for what, unit, loss, model, share in rows:
        yield f"{what:<16}{unit(loss):>12}{unit(model):>12}{percent(share):>10}"
    yield f"{'time, estimated':<40}{percent(shares.time):>10}"
    within = f", and in {_counted(job.within, 'layer')} within the model" if job.within else ""
    yield f"SimReg: {name(job, setting)}{within}; receives {size(received.forward)} in forward"
    parts = zip(traffic._fields, traffic, strict=True)
    yield "the model receives for " + ", ".join(f"{kind} {size(part)}" for kind, part in parts)


def _advice(job: Job, variant: str, every: list[Option], bound: float) -> Iterator[str]:
    best = within(every, bound)
    if best is None:
        least = min(every, key=lambda option: option.shares.time)
        yield f"no setting is within {percent(bound)} of the step's time; the cheapest is"
        yield f"{name(job, least.setting)}: {percent(least.shares.time)}"
    else:
        instead = "" if best.setting.variant == variant else f"; {variant} is not at that span"
        yield f"within {percent(bound)} of the step's time: {name(job, best.setting)}{instead}"
    yield ""
    yield columns()
    for option in every:
        mark = "*" if option is best else " "
        yield f"{mark} {name(job, option.setting):<44}{cells(option.shares)}"
