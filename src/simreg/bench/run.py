"""`simreg bench`: every contender over a grid of shapes, to a table, JSON and a figure."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console

from simreg import theme
from simreg.bench import measure, plots, problem
from simreg.bench.contenders import BARE, Contender, contenders
from simreg.bench.problem import Shape
from simreg.bench.records import measure_shape
from simreg.bench.table import table
from simreg.loss import VARIANTS
from simreg.recipe import outputs, progress, provenance
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.numbers import Whole, default_of

WHAT = (
    "forward + backward: medians of interleaved rounds after a warm-up, caches not flushed; "
    "peak memory beyond the inputs, the gradient included"
)


@dataclass
class BenchOptions:
    """Time the loss, forward and backward, and measure its memory, beside its peers.

    Each backend, the L×L reference (also compiled), a chunked loss in plain PyTorch and
    pytorch-metric-learning's SupConLoss (where installed) are compared with the bare matrix
    products that the loss consists of. Prints a table for each shape; writes JSON and a figure.
    """

    shapes: Annotated[list[str], default_of("what suits the machine")] = field(default_factory=list)
    """LENGTHxDIM or BATCHxLENGTHxDIM, such as `--shapes 1024x512 4096x512`."""
    tokens: Annotated[Whole | None, default_of("4096; on CUDA 65536")] = None
    """Tokens of a batch, for shapes that do not say how many rows."""
    dtypes: Annotated[list[str], default_of("float32; on CUDA bfloat16")] = field(
        default_factory=list
    )
    """Of the embeddings: float32, bfloat16, float16, float64."""
    chunks: list[int] = field(default_factory=lambda: [0])
    """Compare tokens within chunks of so many only; 0: the whole row."""
    variants: list[str] = field(default_factory=lambda: ["out"])
    """Of the loss: out, in, decoupled. Peers know only `out`."""
    contenders: Annotated[list[str], default_of("all")] = field(default_factory=list)
    """Only these, beside the bare products: names as in the table."""
    device: str = "auto"
    """cpu, cuda or mps; auto: an accelerator if there is one."""
    rounds: int = 15
    """Measurements of each contender, at most."""
    seconds: float = 20.0
    """No new round for a shape after so long."""
    memory: bool = True
    """Measure memory too (on the CPU each figure takes a process of its own)."""
    out: Annotated[Path | None, default_of("benchmarks/results/bench-DEVICE.json")] = None
    """The JSON file, written after each shape, and the figure beside it as .png and .svg."""


def main(options: BenchOptions) -> None:
    """Run the command; UserError for options that cannot be met."""
    console = progress.console()
    out = expanded(options.out or _default_out(find_device(options.device)))
    check_writable(out)
    results = bench(options, console, command=outputs.command(), save=partial(write, out=out))
    drawn = write(results, out)
    console.print(f"results {out}")
    if drawn:
        console.print(f"figure  {out.with_suffix('.png')}")


def bench(
    options: BenchOptions,
    console: Console,
    *,
    command: str,
    save: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Measure what the options ask for and print each shape's table; the results as in the JSON.

    `save` is given what there is after each shape, so that an interruption costs one.
    """
    device = find_device(options.device)
    grid, chosen = _grid(options, device), _chosen(options, device)
    records: list[dict[str, Any]] = []
    left = [str(shape) for shape in grid]
    results = {
        "what": WHAT,
        "command": command,
        "records": records,
        "left": left,
        "machine": _machine(device),
        "versions": _versions(),
    }
    for shape in grid:
        with console.status(f"measuring {shape}"):
            found = measure_shape(
                shape,
                chosen,
                device,
                rounds=options.rounds,
                seconds=options.seconds,
                memory=options.memory,
            )
        console.print(table(str(shape), found), soft_wrap=False)
        records += found
        del left[0]
        if save is not None:
            save(results)
    return results


def _grid(options: BenchOptions, device: torch.device) -> list[Shape]:
    sizes, tokens, dtype = problem.default_sizes(device)
    if options.rounds < measure.LEAST_ROUNDS:
        least = measure.LEAST_ROUNDS
        raise UserError(f"--rounds: expected {least} or more, got {options.rounds}")
    if not options.seconds >= 0:  # nor NaN
        raise UserError(f"--seconds: expected 0 or more, got {options.seconds:g}")
    for flag in ("chunks", "variants"):
        if not getattr(options, flag):
            raise UserError(f"--{flag}: expected one or more")
    return problem.shapes(
        options.shapes or sizes,
        tokens if options.tokens is None else options.tokens,
        options.dtypes or [dtype],
        [chunk or None for chunk in options.chunks],
    )


def _chosen(options: BenchOptions, device: torch.device) -> list[Contender]:
    for variant in options.variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants: expected any of {', '.join(VARIANTS)}, got {variant!r}")
    every = contenders(device, list(dict.fromkeys(options.variants)))
    names = {contender.name: None for contender in every}
    for name in options.contenders:
        if name not in names:
            every_name = ", ".join(map(shlex.quote, names))  # some of which have spaces
            raise UserError(f"--contenders: expected any of {every_name}; got {name!r}")
    chosen = {BARE, *(options.contenders or names)}
    return [contender for contender in every if contender.name in chosen]


def find_device(name: str) -> torch.device:
    """The device of that name; UserError if this machine has none."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if name not in available:
        raise UserError(f"--device: expected auto, cpu, cuda or mps, got {name!r}")
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here")
    return torch.device(name)


def check_writable(out: Path) -> None:
    """Find out before the measurements whether the results can be written."""
    try:
        if out.is_dir():
            raise UserError(f"--out {out}: expected a file name, this is a folder")
        if out.suffix in (".png", ".svg"):
            raise UserError(f"--out {out}: expected the name of the JSON file, not of the figure")
        provenance.check_writable(out)
        outputs.check_results(out, "records", "simreg bench")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None


def write(results: dict[str, Any], out: Path) -> bool:
    """The JSON file and, beside it, the figure; whether there is anything to draw."""
    outputs.write(out, results)
    figure = plots.figure(results["records"])
    return figure is not None and theme.save(figure, out.parent, out.stem)


def _machine(device: torch.device) -> dict[str, Any]:
    return provenance.machine() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _versions() -> dict[str, str | None]:
    return provenance.versions() | {
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _default_out(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", _machine(device)["device"].lower()).strip("-")
    return Path("benchmarks", "results", f"bench-{name}.json")
