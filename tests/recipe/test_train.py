"""`simreg train`: what it computes, records, prints, refuses."""

import importlib.machinery
import itertools
import json
import math
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from transformers import AutoModelForCausalLM, AutoTokenizer

from simreg.recipe import assemble, loop, progress, timing
from simreg.recipe.config import RunConfig, from_dict
from simreg.recipe.data import Corpus, prepare
from simreg.recipe.errors import Diverged, UserError
from simreg.recipe.train import train
from tests.recipe import tiny
from tests.recipe.tiny import Make


def lines(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [x for x in tiny.metrics(config.out) if x["kind"] == kind]


def mean_ce(model: torch.nn.Module, corpus: Corpus) -> float:
    """Cross-entropy per predicted token of the validation rows, in float64."""
    total = 0.0
    for row in (corpus.validation[i] for i in range(len(corpus.validation))):
        with torch.no_grad():
            logits = model(row["input_ids"][None]).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, row["labels"][1:], reduction="sum")
    return float(total) / (len(corpus.validation) * (corpus.validation.seq_len - 1))


@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_result_is_the_exported_models_own(make: Make, preset: str) -> None:
    config = make(model={"preset": preset})
    corpus = prepare(config.data)
    result = train(config, corpus=corpus)
    folder = Path(config.out) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == corpus.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.use_cache
    assert model.generation_config.use_cache
    assert result["final_ce"] == pytest.approx(mean_ce(model, corpus), abs=1e-5)
    assert result["final_ce"] < math.log(corpus.vocab_size) - 0.5  # it has learnt
    assert result["tokens"] == tiny.STEPS * 4 * 32
    assert result["params"]["total"] == sum(p.numel() for p in model.parameters())
    assert result["corpus"]["fingerprint"] == corpus.fingerprint
    assert result["objective"]["weight"] == 0.3
    assert ("router_loss" in lines(config, "train")[0]) == (preset == "mixtral-test")


def test_metrics_at_the_steps_asked_for(make: Make) -> None:
    config = make()
    train(config)
    assert [x["step"] for x in lines(config, "eval")] == [7, 14, 20]
    assert [x["step"] for x in lines(config, "train")] == [3, 6, 7, 9, 12, 14, 15, 18, 20]
    record = lines(config, "train")[0]
    assert record.keys() == {"kind", "step", "tokens", "ce", "simreg", "pos_cos", "neg_cos"} | {
        "pos_fraction",
        "earlier",
        "simreg_weight",
        "lr",
        "grad_norm",
        "clipped",
    }
    assert record["tokens"] == 3 * 4 * 32
    assert record["simreg_weight"] == pytest.approx(0.3 * (1 - 2 / tiny.STEPS))  # of its last step
    kept = sorted(p.name for p in (Path(config.out) / "checkpoints").iterdir())
    assert kept == ["step-0000014", "step-0000020"]


def test_arms_of_a_seed_start_alike_and_see_the_same_batches(make: Make) -> None:
    each_step = {"log_every": 1, "tokens": 4 * 4 * 32, "evals": 1}
    with_loss, plain = make("a", train=each_step), make("b", train=each_step, simreg={"weight": 0})
    other = make("c", train=each_step | {"seed": 1})
    longer = make("d", train=each_step | {"tokens": 40 * 4 * 32})
    for config in (with_loss, plain, other, longer):
        train(config)
    first, base, elsewhere, long = (lines(c, "train")[0] for c in (with_loss, plain, other, longer))
    assert first["ce"] == base["ce"] == long["ce"] != elsewhere["ce"]
    assert base["simreg"] is None
    assert "simreg_weight" not in base
    assert first["simreg"] > 0
    assert first["grad_norm"] != base["grad_norm"]


def test_accumulation_equals_the_whole_batch(make: Make) -> None:
    for name, parts in (("a", 1), ("b", 2)):
        config = make(name, train={"accumulate": parts})
        train(config)
    for one, two in zip(tiny.metrics(make("a").out), tiny.metrics(config.out), strict=True):
        assert one.pop("kind") == two.pop("kind")
        assert one == pytest.approx(two, abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_follows_the_schedule(make: Make, schedule: str) -> None:
    config = make(
        optim={"schedule": schedule, "warmup": 0.25, "min_lr_ratio": 0.1, "lr": 1e-3},
        train={"log_every": 1, "evals": 1},
    )
    train(config)
    rates = [x["lr"] for x in lines(config, "train")]  # at step k, the rate of step index k - 1
    if schedule == "cosine":
        wave = [0.5 * (1 + math.cos(math.pi * (k - 5) / 15)) for k in range(5, 20)]
        expected = [k / 5 for k in range(5)] + [0.1 + 0.9 * w for w in wave]
    else:
        expected = [0.1 + 0.9 * k / 5 for k in range(5)] + [1.0] * 11
        expected += [1 - 0.9 * k / 4 for k in range(4)]
    assert rates == pytest.approx([1e-3 * x for x in expected[: len(rates)]], rel=1e-6)


def test_scope_document_keeps_documents_apart(make: Make) -> None:
    one_step = {"tokens": 128, "evals": 1}
    row, document = (
        make(scope, train=one_step, simreg={"scope": scope}) for scope in ("row", "document")
    )
    corpus = prepare(row.data)
    rows = [corpus.train[i] for i in range(4)]
    assert set(assemble.collator(row)(rows)) == {"input_ids", "labels"}
    assert set(assemble.collator(document)(rows)) == {"input_ids", "labels", "segments"}
    plain = make("plain", simreg={"scope": "document", "weight": 0})
    assert set(assemble.collator(plain)(rows)) == {"input_ids", "labels"}
    rival = make("rival", simreg={"scope": "document", "weight": 0}, auxiliary={"name": "z-loss"})
    assert "segments" in assemble.collator(rival)(rows)
    train(row)
    train(document)
    assert lines(row, "train")[0]["ce"] == lines(document, "train")[0]["ce"]
    assert lines(row, "train")[0]["simreg"] > lines(document, "train")[0]["simreg"]


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of a step NaN."""
    original = loop.RunTrainer.compute_loss

    def compute(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(loop.RunTrainer, "compute_loss", compute)


def test_nan_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(train={"log_every": 5})
    with monkeypatch.context() as patch:
        poison(patch, 9)
        with pytest.raises(
            Diverged,
            match=r"loss became NaN or infinite at step 9; .*step-0000007; lower optim.lr, "
            r"lengthen optim.warmup or lower simreg.weight$",
        ):
            train(config)
    kept = [p.name for p in (Path(config.out) / "checkpoints").iterdir()]
    assert kept == ["step-0000007"]
    assert train(config)["steps"] == tiny.STEPS  # the good checkpoint still serves


def test_saving_leaves_the_trainers_folder_as_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    original = loop.RunTrainer._evaluate

    def evaluate(self: loop.RunTrainer, *args: Any) -> Any:
        seen.add(self.args.output_dir)
        return original(self, *args)

    monkeypatch.setattr(loop.RunTrainer, "_evaluate", evaluate)
    train(make(train={"save_every": 1, "evals": 3}))
    assert len(seen) == 1


def test_weights_that_are_nan_are_never_saved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    original = loop.RunTrainer._evaluate

    def evaluate(self: loop.RunTrainer, *args: Any) -> Any:  # just before the checkpoint
        result = original(self, *args)
        if self.state.global_step == 14:
            next(self.model.parameters()).data[0, 0] = math.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunTrainer, "_evaluate", evaluate)
        with pytest.raises(Diverged, match="weights became NaN or infinite by step 14"):
            train(config)
    assert [p.name for p in (Path(config.out) / "checkpoints").iterdir()] == ["step-0000007"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"vocab_size": 100}}, "tokenizer has 300 tokens but model.vocab_size is 100"),
        ({"model": {"preset": "none"}}, "no preset 'none'"),
        ({"train": {"batch_rows": 100_000}}, "fewer than one batch"),
        ({"train": {"report_to": "wandb"}}, "wandb is not installed: pip install wandb"),
    ],
)
def test_mistakes_have_one_line(
    make: Make, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=says) as error:
        train(make(**changes))
    assert "\n" not in str(error.value)


def test_a_tracker_that_nobody_is_logged_in_to(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.api = types.SimpleNamespace(api_key=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(assemble, "WandbCallback", lambda: "sent")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="nobody is logged in: `wandb login`, or set WANDB_MODE"):
        assemble.reporter("wandb", Path(), 0)
    with pytest.raises(UserError, match="nobody is logged in"):
        train(make(train={"report_to": "wandb"}))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert assemble.reporter("wandb", Path(), 0) == ["sent"]
    monkeypatch.delenv("WANDB_MODE")
    wandb.api.api_key = "known"
    assert assemble.reporter("wandb", Path(), 0) == ["sent"]


def test_batch_is_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert assemble.micro_batch(from_dict({"train": {"batch_rows": 16, "accumulate": 4}})) == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"must be a multiple of .* times the 3 processes"):
        assemble.micro_batch(from_dict({}))


def test_what_is_printed(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    config = make(optim={"warmup": 0.1})
    corpus = prepare(config.data, progress=False)
    capfd.readouterr()
    train(config, corpus=corpus)
    out, error = capfd.readouterr()
    assert error == ""
    head, size, *steps, done = out.splitlines()
    assert head.startswith("llama-test: 0.04M parameters, ")
    assert size == f"20 steps of 128 tokens = 2,560 tokens, from a corpus of {corpus.tokens:,}"
    assert len(steps) == 9 + 3
    assert steps[0].startswith("step  3/20  15.0%  384 tok  ce 5.")
    for part in ("simreg ", "lr 3.00e-03", "grad-norm ", " tok/s", "eta "):
        assert part in steps[0]
    assert steps[-1].startswith("step 20/20 100.0%  2.56k tok  validation ce ")
    assert done.startswith("done: validation ce ")


def test_text_that_comes_again_is_announced(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    config = make(train={"tokens": 20 * 128 * 11})
    corpus = prepare(config.data, progress=False)
    passes = 11 * 20 * 4 / len(corpus.train)
    assert passes > 1
    train(config, corpus=corpus)
    head = capfd.readouterr().out.splitlines()[1]
    assert head.endswith(f"from a corpus of {corpus.tokens:,} ({passes:.3g} passes)")


def test_on_step_takes_the_place_of_the_lines(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make()
    seen: list[dict[str, Any]] = []
    train(config, corpus=prepare(config.data, progress=False), on_step=seen.append)
    assert capfd.readouterr().out == ""
    assert all(x["steps"] == tiny.STEPS and x["eta"] >= 0 for x in seen)
    assert [x["step"] for x in seen] == [x["step"] for x in tiny.metrics(config.out)]
    assert seen[-1]["eta"] == 0


def test_evaluation_can_be_cut_short(make: Make) -> None:
    config = make(train={"eval_tokens": 40})
    corpus = prepare(config.data)
    assert len(corpus.validation) > 2
    train(config, corpus=corpus)
    model = AutoModelForCausalLM.from_pretrained(Path(config.out) / "model").eval()
    rows = torch.stack([corpus.validation[i]["input_ids"] for i in range(2)])
    with torch.no_grad():
        expected = model(rows, labels=rows).loss
    assert lines(config, "eval")[-1]["ce"] == pytest.approx(float(expected), abs=1e-5)


def test_bf16_autocast_is_near_fp32(make: Make) -> None:
    full, half = make("a"), make("b", train={"precision": "bf16"})
    exact, rounded = train(full)["final_ce"], train(half)["final_ce"]
    assert exact != rounded
    assert exact == pytest.approx(rounded, abs=0.02)


def test_what_accelerate_reads_is_as_it_was_after_a_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a program that the caller starts next would compute in bfloat16 as well."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def told() -> dict[str, str]:
        return {name: x for name, x in os.environ.items() if name.startswith("ACCELERATE_")}

    before = told()
    train(make(train={"precision": "bf16", "tokens": 128}))
    assert told() == before
    with pytest.raises(UserError, match=r"no file .missing"):
        train(make("b", data={"source": "missing.jsonl"}, train={"precision": "bf16"}))
    assert told() == before


def test_how_to_compile_is_not_the_launchers_to_say(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "max-autotune" if name == "MODE" else "1")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # the default
        with assemble.governed(make(train={"compile": True})):
            found = vars(TorchDynamoPlugin())
            assert not torch._dynamo.config.skip_nnmodule_hook_guards
        assert torch._dynamo.config.skip_nnmodule_hook_guards
    with monkeypatch.context() as unset:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
            unset.delenv(name)
        assert found == vars(TorchDynamoPlugin(backend="inductor"))
    assert os.environ["ACCELERATE_DYNAMO_MODE"] == "max-autotune"


def test_step_times_are_paired_and_warmed_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[float] = []
    # Ratios of the pairs: 15, 1.5, 1.1; the ratio of the two medians would be 2.75.
    monkeypatch.setattr(timing, "LEAST_PAIRS", 3)
    times = {0.0: [9.0] * timing.WARM_UP + [1, 4, 10], 0.3: [1.0] * timing.WARM_UP + [15, 6, 11]}

    def step(self: timing.Stepper) -> float:
        weight = self.config.simreg.weight
        order.append(weight)
        return times[weight][order.count(weight) - 1]

    monkeypatch.setattr(timing.Stepper, "step", step)
    base, arm = make(simreg={"weight": 0}), make()
    corpus = prepare(base.data)
    monkeypatch.setattr(timing, "WITHIN", 100)
    measured = timing.step_time_ratio(base, arm, corpus, pairs=3)
    # Each arm comes first in every other pair.
    assert order == ([0.0, 0.3, 0.3, 0.0] * (timing.WARM_UP + 3))[: 2 * (timing.WARM_UP + 3)]
    assert measured == {
        "ratio": pytest.approx(1.5),
        "ratio_quartiles": [pytest.approx(1.3), pytest.approx(8.25)],
        "base_s": 4,
        "arm_s": 11,
        "n": 3,
        "threads": torch.get_num_threads(),
        "load": measured["load"],
    }
    assert measured["load"] >= 0


def test_an_impatient_timing_still_takes_eight_pairs(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.Stepper, "step", lambda self: 1.0)
    base = make(simreg={"weight": 0})
    corpus = prepare(base.data)
    assert timing.step_time_ratio(base, make(), corpus, pairs=50, seconds=0)["n"] == 8
    assert timing.step_time_ratio(base, make(), corpus)["n"] == 20


@pytest.mark.parametrize(("slower", "pairs"), [(0.02, 20), (0.06, 23), (0.1, 62), (9.0, 200)])
def test_uneven_steps_are_timed_until_their_ratio_is_known(
    make: Make, monkeypatch: pytest.MonkeyPatch, slower: float, pairs: int
) -> None:
    """Ratios from 1 to 1 + `slower` in equal parts: their quartiles are half of it apart."""
    parts = itertools.cycle(1 + slower * i / 8 for i in (0, 4, 8, 2, 6))

    def step(self: timing.Stepper) -> float:
        return next(parts) if self.config.simreg.weight else 1.0

    monkeypatch.setattr(timing.Stepper, "step", step)
    base = make(simreg={"weight": 0})
    measured = timing.step_time_ratio(base, make(), prepare(base.data))
    assert measured["n"] == pytest.approx(pairs, abs=4)
    assert measured["ratio"] == pytest.approx(1 + slower / 2, abs=0.13 * slower)


def test_a_timed_step_is_a_real_one(make: Make) -> None:
    config = make()
    corpus = prepare(config.data)
    stepper = timing.Stepper(config, corpus, 2)
    before = [p.clone() for p in stepper.model.parameters()]
    assert stepper.step() > 0
    after = stepper.model.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert timing.throughput(config, corpus, steps=3) > 0


def test_an_arm_is_timed_after_the_compiled_baseline(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    base = make(simreg={"weight": 0}, train={"compile": True})
    arm = make(train={"compile": True})
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # the default
        assert timing.step_time_ratio(base, arm, prepare(base.data), seconds=0)["n"] == 8


@pytest.mark.parametrize("where", ["simreg.recipe.assemble.model", "transformers.Trainer.train"])
def test_too_little_memory_of_a_cpu_is_said(
    make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def allocates(*args: Any, **kwargs: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(where, allocates)
    with pytest.raises(UserError, match="the device is out of memory"):
        train(make())


class TestProgress:
    record = {"kind": "train", "step": 5, "ce": 2.5, "simreg": None, "lr": 1e-3}  # noqa: RUF012
    record |= {
        "tokens": 1_234_567,
        "grad_norm": 1.0,
        "tokens_per_s": 12345.6,
        "mfu": 0.412,
        "eta": 3723.0,
    }

    def test_line(self) -> None:
        assert progress.log_line(self.record, total=1000) == (
            "step    5/1000   0.5%  1.23M tok  ce 2.5000  lr 1.00e-03  grad-norm 1.00  "
            "12,346 tok/s  mfu 41.2%  eta 1h02m"
        )

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0"),
            (999, "999"),
            (4096, "4.10k"),
            (61_440, "61.4k"),
            (999_900, "1.00M"),
            (6e11, "600B"),
        ],
    )
    def test_tokens(self, count: float, text: str) -> None:
        assert progress.tokens(count) == text

    @pytest.mark.parametrize(
        ("name", "peak"),
        [
            ("NVIDIA H100 80GB HBM3", 989e12),
            ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA A100-SXM4-40GB", 312e12),
            ("NVIDIA L40S", 362e12),
            ("NVIDIA L40", 181e12),
            ("NVIDIA L4", 121e12),
            ("NVIDIA RTX A1000", None),
            ("Some Other GPU", None),
        ],
    )
    def test_peak(self, name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert progress.peak_flops(torch.device("cuda")) == peak
        assert progress.peak_flops(torch.device("cpu")) is None

    def test_half_a_line_left_by_a_crash_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        one, two, three = ({"kind": "train", "step": step} for step in (1, 2, 3))
        path.write_text("".join(json.dumps(r) + "\n" for r in (one, two, three)) + '{"st')
        file = progress.MetricsFile(path, 2)
        file.write({"step": 3, "new": True})
        file.close()
        written = [json.loads(x) for x in path.read_text().splitlines()]
        assert written == [one, two, {"step": 3, "new": True}]
