"""How much longer a whole training step takes with the loss: interleaved steps in one process.

    python benchmarks/step.py                          # llama-tiny at the shape of `simreg train`
    python benchmarks/step.py --set model.preset=llama-130m,data.seq_len=2048,train.batch_rows=32

Forward, backward, clipping and AdamW, on the standard library's text.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from simreg.recipe import config, data, provenance
from simreg.recipe.timing import step_time_ratio
from simreg.recipe.values import parse_assignments

RESULTS = Path(__file__).parent / "results"


@dataclass
class Options:
    """Measure the step time of a training run with SimReg over that without."""

    set: str = ""
    """Fields of the run's config, `section.key=value,...`."""
    pairs: int = 60
    """Pairs of steps; up to ten times as many while their ratio is not known to a hundredth."""
    seconds: float = 240.0
    """No new pair after so long."""
    out: Path | None = None
    """The JSON file; default: benchmarks/results/step-PRESET-DEVICE.json."""


def main(options: Options) -> None:
    with_loss = config.from_dict(parse_assignments(options.set, "--set") if options.set else {})
    without = config.with_overrides(with_loss, {"simreg": {"weight": 0}})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset = with_loss.model.preset
    out = provenance.check_writable(options.out or RESULTS / f"step-{preset}-{device}.json")
    corpus = data.prepare(with_loss.data)
    measured = step_time_ratio(without, with_loss, corpus, options.pairs, options.seconds)
    results = {
        "what": "time of a training step with SimReg over one without, median over pairs",
        **measured,
        "config": config.to_dict(with_loss),
    }
    provenance.write(out, results)
    low, high = measured["ratio_quartiles"]
    print(f"{preset}: × {measured['ratio']:.3f} ({low:.3f} to {high:.3f}); written to {out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
