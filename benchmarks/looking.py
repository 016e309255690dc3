"""What it costs to look at a model: in training (`train.analyze_every`), and 1,000 cloze items.

    python benchmarks/looking.py                       # llama-tiny at the shape of `simreg train`

Steps and looks take turns in one process. The cloze items are of the standard library's held-out
documents, the weights are random: neither changes the work.
"""

import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

from simreg.evaluation import excerpts
from simreg.evaluation.offline import ITEMS, Cloze, documents
from simreg.evaluation.scoring import Scorer
from simreg.recipe import assemble, config, data, provenance
from simreg.recipe.probe import Probe
from simreg.recipe.timing import WARM_UP, Stepper
from simreg.recipe.values import parse_assignments

RESULTS = Path(__file__).parent / "results"
EVERY = 10
"""Steps from look to look, of which the share of time is taken."""


@dataclass
class Options:
    """Measure a look at the geometry beside a training step, and the cloze test."""

    set: str = ""
    """Fields of the run's config, `section.key=value,...`."""
    rounds: int = 20
    """Steps, and looks."""
    out: Path | None = None
    """The JSON file; default: benchmarks/results/looking-PRESET-DEVICE.json."""


def main(options: Options) -> None:
    run = config.from_dict(parse_assignments(options.set, "--set") if options.set else {})
    preset, device = run.model.preset, assemble.device().type
    out = provenance.check_writable(options.out or RESULTS / f"looking-{preset}-{device}.json")
    corpus = data.prepare(run.data)
    stepper = Stepper(run, corpus, WARM_UP + options.rounds)
    look = looker(stepper, Probe(corpus.validation))
    times = [(stepper.step(), look()) for _ in range(WARM_UP + options.rounds)][WARM_UP:]
    step_s, look_s = (statistics.median(column) for column in zip(*times, strict=True))
    items = excerpts.cloze([d for d in documents(corpus) if d.strip()], ITEMS, 0)
    scorer = Scorer(stepper.model.eval(), max_length=run.data.seq_len, bf16=stepper.bf16)
    began = time.perf_counter()
    Cloze(items, "").run(scorer, corpus.tokenizer, lambda count: None)
    results = {
        "what": "median seconds of a training step and of a look; seconds of four-way cloze items",
        "step_s": step_s,
        "look_s": look_s,
        f"share_every_{EVERY}": look_s / (EVERY * step_s),
        "cloze_items": len(items),
        "cloze_s": time.perf_counter() - began,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "config": config.to_dict(run),
    }
    provenance.write(out, results)
    share = look_s / (EVERY * step_s)
    print(
        f"{preset}: step {step_s:.3f} s, look {look_s:.3f} s: {share:.1%} at every {EVERY}th step"
    )
    print(f"{len(items)} cloze items: {results['cloze_s']:.1f} s; written to {out}")


def looker(stepper: Stepper, probe: Probe):  # type: ignore[no-untyped-def]
    """A function that looks once and returns the seconds it took."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model, **unused: model),
        args=SimpleNamespace(device=stepper.device),
        compute_loss_context_manager=contextlib.nullcontext,
        model=stepper.model,
        regularizer=None if stepper.reg is None else stepper.reg.objective,
    )

    def look() -> float:
        began = time.perf_counter()
        probe(trainer)
        return time.perf_counter() - began

    return look


if __name__ == "__main__":
    main(tyro.cli(Options))
