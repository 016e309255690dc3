"""The configuration of one training run: typed, validated, saved with the run as YAML.

Values come from the defaults here, then a YAML file, then command-line flags (later ones win).
"""

import functools
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from simreg.baselines import registry
from simreg.depths import DEPTHS, EARLIER, default_depths, layers_within, offsets_at
from simreg.loss import (
    LEAST_TEMPERATURE,
    MOST_TEMPERATURE,
    PUSH,
    PUSH_ABOVE,
    TEMPERATURE,
    WEIGHT,
    Variant,
)
from simreg.recipe.errors import UserError, describe
from simreg.recipe.numbers import (
    Count,
    Depth,
    Fraction,
    NonNegative,
    Number,
    Offsets,
    Positive,
    Whole,
    default_of,
)
from simreg.recipe.presets import PRESETS
from simreg.recipe.values import merge, parse_yaml, read_yaml
from simreg.schedule import SCHEDULE, Schedule, ScheduleName

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid")
WSD_DECAY = 0.2
"""Share of the steps over which the `wsd` schedule decays."""
BEFORE: dict[str, Any] = {
    "simreg": {
        "push": 0.0,
        "depths": [],
        "depths_offset": 0,
        "schedule": "constant",
        "schedule_fraction": 0.5,
    }
}
"""Runs and studies write all fields; those of a version that did not know one did as here."""


def _from_words(words: list[str]) -> dict[str, Any]:
    """`key=value` words of a command line; values are read as YAML, as a file would."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            found[key] = parse_yaml(value)
        except yaml.YAMLError:
            key = ""
        if not (key and equals):
            raise ValueError(f"{word!r} is not of the form KEY=VALUE")
    return found


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE ...",
        instance_from_str=_from_words,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda options: [f"{key}={value}" for key, value in options.items()],
    ),
]


def _checked(section: type[T]) -> type[T]:
    """Let construction, by hand or by tyro, report a wrong value as UserError."""
    validate = section.__init__
    name = section.__name__.removesuffix("Config").lower()
    prefix = "" if name == "run" else f"{name}."

    @functools.wraps(validate)
    def init(self: T, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise UserError(describe(error, section, prefix)) from None

    section.__init__ = init  # type: ignore[method-assign, assignment]
    return section


@_checked
@dataclass(config=_STRICT, frozen=True)
class ModelConfig:
    """The network, trained from scratch."""

    preset: str = "llama-tiny"
    """One of the presets that `simreg train --list-models` prints."""
    hidden_size: Count | None = None
    """Another width than the preset's, in multiples of its head's; all that goes with the width is
    scaled."""
    layers: Count | None = None
    """Another number of layers than the preset's."""
    tie_embeddings: bool = False
    """Share the input embedding with the LM head."""
    vocab_size: Annotated[Whole, Field(gt=0, le=2**24)] | None = None
    """Rows of the embedding, at least the tokenizer's size; None: just that size."""
    embedding_std: Positive | None = None
    """Standard deviation of the input embedding at the start (Takase et al., arXiv 2312.16903, find
    1 more stable); None: that of all matrices, 0.02."""
    head_bias: Literal["unigram"] | None = None
    """A bias of the LM head, which starts at the log frequencies of the training tokens (Meister et
    al., arXiv 2212.09686); None: none, as in Llama and Mixtral."""

    def __post_init__(self) -> None:
        if self.tie_embeddings and self.embedding_std is not None:
            raise ValueError(
                "model.embedding_std would change the LM head as well, which model.tie_embeddings "
                "makes the same matrix: leave one of them out"
            )


@_checked
@dataclass(config=_STRICT, frozen=True)
class DataConfig:
    """The text and how it becomes rows of tokens."""

    source: str | list[str] = "python-stdlib"
    """`python-stdlib`, a file, a glob, a Hugging Face dataset id (`hf:owner/name[:config]`), or a
    list of these."""
    validation: str | list[str] | None = None
    """Where validation text comes from; None: documents held out of `source`."""
    validation_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out for validation, if `validation` is None."""
    text_field: str = "text"
    """The field of JSON lines, parquet and datasets that holds the text."""
    tokenizer: str = "bpe:4096"
    """`bpe:SIZE` trains a byte-level BPE on the source (cached); anything else is a local folder or
    a Hub id."""
    seq_len: Annotated[Whole, Field(ge=2)] = 256
    """Tokens a row."""
    max_tokens: Count | None = None
    """Stop reading the training source after this many tokens (rounded up to a document)."""
    cache_dir: str = "~/.cache/simreg"
    """Where tokenised text and trained tokenizers are kept."""


@_checked
@dataclass(config=_STRICT, frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices inside the layers, AdamW for the rest."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    warmup: Fraction = 0.3
    """Warm-up as a fraction of all steps. The default is long, since a short one handicaps plain
    cross-entropy in short runs and flatters SimReg (docs/results-no-bias.md)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Cosine decay, or warm-up, stable, decay over the last fifth."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a fraction of the peak."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay (matrices only)."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip: NonNegative = 1.0
    """Maximal gradient norm; 0: no clipping."""


@_checked
@dataclass(config=_STRICT, frozen=True)
class SimRegConfig:
    """The regularizer; `weight` 0 is plain cross-entropy."""

    weight: NonNegative = WEIGHT
    """λ, the weight beside cross-entropy; its largest, as `schedule` has it."""
    temperature: Annotated[Positive, Field(ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)] = TEMPERATURE
    """τ, the divisor of cosines."""
    variant: Variant = "out"
    """Which of the three formulas (docs/loss.md)."""
    chunk_size: Annotated[Count, Field(ge=2)] | None = None
    """Compare only tokens in the same chunk of this many positions; None: the whole row."""
    push: NonNegative = PUSH
    """Weight, beside SimReg and times λ (so nothing at λ = 0), of a push between all tokens that
    are too alike (docs/loss.md)."""
    push_above: Annotated[Number, Field(ge=-1, le=1)] = PUSH_ABOVE
    """The cosine above which they are."""
    depths: list[Depth] = field(default_factory=lambda: list(DEPTHS))
    """Where else in the model, as fractions of its depth: 0.5 is the middle layer. With the same λ,
    which counts once for each; without a value nowhere. By default in a model of two layers the
    first alone, in one of one layer none."""
    depths_offset: Annotated[Offsets | None, default_of("-2 up to depth 0.25, 1 beyond")] = None
    """The label they are compared by there, all of them or (a list) each: 0, the next token, as in
    the final hidden states; 1, that of the next position, if it is in the row (`scope: document`:
    document), and so on; −2, the token before. None: −2 up to depth 0.25, 1 beyond."""
    scope: Literal["row", "document"] = "row"
    """Compare tokens of a whole row, or only those of the same document in it."""
    schedule: ScheduleName = SCHEDULE
    """How λ changes over the run: not at all, up from 0 over the first `schedule_fraction` of the
    steps, down to 0 over the last, or 0 after it (docs/results.md, "Which defaults, and why?")."""
    schedule_fraction: Annotated[Fraction, Field(gt=0)] | None = None
    """Share of the steps that `schedule` speaks of; None: all of them for `decay`, half of them for
    the others."""

    @property
    def over_run(self) -> Schedule:
        """`schedule` and `schedule_fraction` as one."""
        return Schedule(self.schedule, self.schedule_fraction)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The label at each of `depths`. ValueError if `depths_offset` are more or fewer."""
        return offsets_at(self.depths, self.depths_offset) if self.depths else ()

    def within(self, layers: int) -> dict[float, int]:
        """Which depths a model of so many layers has, and the label at each."""
        offsets = dict(zip(self.depths, self.offsets, strict=True))
        if self.by_default:
            return {at: offset for at, offset in offsets.items() if at in default_depths(layers)}
        return offsets

    @property
    def by_default(self) -> bool:
        """Of such `depths` a shallow model has those that it has layers for, others it refuses."""
        return tuple(self.depths) in (DEPTHS, EARLIER)


@_checked
@dataclass(config=_STRICT, frozen=True)
class AuxiliaryConfig:
    """Another auxiliary loss, instead of SimReg or beside it (docs/rivals.md)."""

    name: str | None = None
    """Which one; None: none."""
    options: Options = field(default_factory=dict)
    """Its options, `weight` among them; those left out keep their defaults. On the command line
    they replace all those of the file, and so does another name."""
    schedule: ScheduleName | None = None
    """How its weight changes over the run, as `simreg.schedule`; None: not at all."""
    schedule_fraction: Annotated[Fraction, Field(gt=0)] | None = None
    """As `simreg.schedule_fraction`."""

    @property
    def over_run(self) -> Schedule:
        """`schedule` and `schedule_fraction` as one."""
        return Schedule(self.schedule or "constant", self.schedule_fraction)

    def __post_init__(self) -> None:
        if self.name is None and (self.options or self.schedule or self.schedule_fraction):
            raise ValueError(
                "auxiliary.options and its schedule are those of auxiliary.name, which is not set"
            )
        if self.schedule_fraction and not self.schedule:
            raise ValueError(
                "auxiliary.schedule_fraction is that of auxiliary.schedule, which is not set"
            )
        object.__setattr__(self, "options", {k: _number(v) for k, v in self.options.items()})
        if self.name is not None:
            try:  # to see what it says; on "meta" no memory and no random numbers are taken
                with torch.device("meta"):
                    registry.build(self.name, self.options, hidden_size=1, vocab_size=1)
            except (TypeError, ValueError) as error:
                raise ValueError(f"auxiliary: {error}") from None


def _number(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@_checked
@dataclass(config=_STRICT, frozen=True)
class TrainConfig:
    """How long, how much at once, how often to look."""

    tokens: Count = 1_000_000
    """Training tokens (rounded up to whole steps)."""
    batch_rows: Count = 16
    """Rows an optimizer step, over all processes and accumulation steps."""
    accumulate: Count = 1
    """Micro-batches an optimizer step; must divide `batch_rows`."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Fixes initialisation and the order of the data."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast where an accelerator supports it, else fp32."""
    compile: bool = False
    """torch.compile the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    timeout: Count = 1800
    """Seconds that a process waits for the others before the run ends with an error."""
    log_every: Count = 10
    """Steps between log lines."""
    evals: Count = 10
    """Validation passes over the run, evenly spread; the last one is at the end."""
    eval_tokens: Count | None = None
    """Tokens of a validation pass; None: the whole validation split."""
    save_every: Count | None = None
    """Steps between checkpoints; None: at each validation pass."""
    keep_checkpoints: Annotated[Whole, Field(ge=2)] = 2
    """Checkpoints kept (at least two, so that a corrupt one has a predecessor)."""
    analyze_every: Annotated[Count | None, tyro.conf.arg(aliases=("--analyze-every",))] = None
    """Steps between looks at the geometry of embeddings (cosines, effective rank, margins) on
    validation text; None: never. Every 10 steps cost under 2 % of the time."""
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where curves are sent, besides metrics.jsonl."""


@_checked
@dataclass(config=_STRICT, frozen=True)
class RunConfig:
    """One training run."""

    out: Annotated[str, Field(min_length=1)] = "runs/train"
    """Folder of the run; the same command again resumes it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    simreg: SimRegConfig = field(default_factory=SimRegConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.train.batch_rows % self.train.accumulate:
            raise ValueError(
                f"train.accumulate={self.train.accumulate} does not divide "
                f"train.batch_rows={self.train.batch_rows}"
            )
        if self.optim.schedule == "wsd" and self.optim.warmup + WSD_DECAY > 1:
            raise ValueError(
                f"optim.warmup={self.optim.warmup} leaves no room for the decay of the wsd "
                f"schedule, which takes the last {WSD_DECAY:.0%} of the steps"
            )

        self._check_depths()

    def _check_depths(self) -> None:
        """ValueError for depths that are the same layer, or the last, whose λ would count twice,
        and for an offset at which no two tokens of a row have a label."""
        own = self.simreg
        if own.weight == 0:
            return
        try:
            offsets = own.offsets
        except ValueError as error:
            raise ValueError(f"simreg.depths_{error}") from None
        if self.model.preset in PRESETS:
            layers = self.model.layers or PRESETS[self.model.preset].layers
            offsets = tuple(own.within(layers).values())
            if not own.by_default:
                try:
                    layers_within(own.depths, layers)
                except ValueError as error:
                    advice = "[], or the flag without a value, leaves it at that"
                    raise ValueError(f"simreg.{error}; {advice}") from None
        # A row of L tokens has L - 1 that another one follows, and one token alone is not compared.
        if offsets and max(map(abs, offsets)) + 3 > self.data.seq_len:
            raise ValueError(
                f"simreg.depths_offset: {list(offsets)} leave no two tokens to compare in rows of "
                f"data.seq_len={self.data.seq_len} tokens"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.train.batch_rows * self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.train.tokens // self.tokens_per_step)


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Build a validated config from nested plain values; UserError names every wrong field."""
    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise UserError(describe(error, RunConfig)) from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, as saved in `config.yaml`."""
    return asdict(config)


def load(path: str | Path) -> RunConfig:
    """Read a YAML file of any subset of the fields."""
    values = read_yaml(path)
    if {"base", "arms"} & values.keys():
        raise UserError(f"{path} is a study, of several runs: simreg compare {path}")
    return _of_file(path, values)


def recorded(path: str | Path) -> RunConfig:
    """Read the YAML file of all fields that a run of this version or an older one wrote."""
    return _of_file(path, merge(BEFORE, read_yaml(path)))


def _of_file(path: str | Path, values: dict[str, Any]) -> RunConfig:
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def as_written(path: Path) -> bool:
    """Whether a YAML file looks as `to_yaml` writes one: no comments, no layout of a person's."""
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.safe_dump(yaml.safe_load(text), sort_keys=False) == text
    except (yaml.YAMLError, UnicodeDecodeError):
        return False


def of_run(path: Path) -> bool:
    """Whether a YAML file is as a run writes its `config.yaml`, with every section."""
    if not as_written(path):
        return False
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return isinstance(values, dict) and values.keys() >= to_dict(RunConfig()).keys()


def to_yaml(config: RunConfig) -> str:
    """The text of `config.yaml`, which `load` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def with_overrides(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """A validated copy with nested overrides, such as `{"optim": {"lr": 1e-3}}`."""
    return from_dict(merge(to_dict(config), overrides))
