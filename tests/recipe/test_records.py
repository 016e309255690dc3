"""What a run keeps and tells: checkpoints, speed, the time that is left, the data it saw."""

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simreg.recipe import assemble, checkpoints, loop, models, progress
from simreg.recipe import train as module
from simreg.recipe.config import with_overrides
from simreg.recipe.data import Ordered, prepare
from simreg.recipe.errors import Diverged, UserError
from simreg.recipe.train import train
from tests.recipe import tiny
from tests.recipe.test_resume import interrupt_at
from tests.recipe.tiny import Make

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded(out: str) -> list[dict[str, Any]]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "train"]


def test_a_resumed_run_tells_its_own_speed(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after step 10, where no line was due, and steps become slower."""
    passed, opened, seen = [0.0], [], list[dict[str, Any]]()
    original = loop.RunTrainer.training_step

    def step(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        passed[0] += (1, 1, 2, 4)[self.state.global_step // 5]
        return original(self, *args, **kwargs)

    def reporter(name: str, folder: Path, step: int) -> list[Any]:
        opened.append((name, folder, step))
        return []

    monkeypatch.setattr(loop.RunTrainer, "training_step", step)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: passed[0])
    monkeypatch.setattr(progress, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(assemble, "reporter", reporter)
    config = tiny.config(tmp_path, text)
    interrupt_at(10, config, tmp_path)
    train(config, on_step=seen.append)
    records = recorded(config.out)
    assert [record["step"] for record in records] == [3, 6, 7, 9, 10, 12, 14, 15, 18, 20]
    assert [record["tokens_per_s"] for record in records] == [128] * 5 + [64] * 3 + [32] * 2
    paces = {12: 2, 14: 2, 15: 2, 18: 22 / 8, 20: 3}  # seconds a step since it was resumed
    assert {r["step"]: r["eta"] for r in seen} == {s: paces[s] * (20 - s) for s in paces}
    shape = models.of_run(config, vocab_size=300)
    flops = models.flops_per_token(shape, models.count_parameters(shape)[1], 32)
    shares = [record["mfu"] for record in seen if record["kind"] == "train"]
    assert shares == pytest.approx([x * flops / 1e9 for x in (64, 64, 64, 32, 32)])
    folder = Path(config.out) / "tensorboard"
    assert opened == [("none", folder, 0), ("none", folder, 10)]


def test_tensorboard_has_the_curves_of_a_resumed_run(tmp_path: Path, text: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny.config(tmp_path, text, {"train": {"report_to": "tensorboard"}})
    tiny.run_and_die(config, tmp_path, "step:13")  # the checkpoint is of step 7
    train(config)
    events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    drawn, known = events.Scalars("train/ce"), recorded(config.out)
    assert [x.step for x in drawn] == [record["step"] for record in known]
    assert [x.value for x in drawn] == pytest.approx([record["ce"] for record in known])
    assert [x.step for x in events.Scalars("eval/ce")] == [7, 14, 20]


def test_checkpoints_as_many_and_as_often_as_asked(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of the last step; none before its lines are on the disk."""
    events = []

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any) -> None:
            events.append(name)
            original(*args)

        monkeypatch.setattr(owner, name, noted)

    note(progress.MetricsFile, "sync")
    note(checkpoints, "seal")
    config = make(train={"save_every": 6, "keep_checkpoints": 3})
    train(config)
    kept = checkpoints.found(Path(config.out) / "checkpoints")
    assert [checkpoints.step_of(path) for path in kept] == [20, 18, 12]
    assert events == ["sync", "seal"] * 4


def test_a_run_sees_the_rows_in_the_order_of_its_seed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = loop.RunTrainer.training_step

    def step(self: loop.RunTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        seen.extend(inputs["input_ids"])
        return original(self, model, inputs, *args)

    monkeypatch.setattr(loop.RunTrainer, "training_step", step)
    config = make(model={"preset": "mixtral-test"}, train={"seed": 3, "evals": 1})
    corpus = prepare(config.data)
    result = train(config, corpus=corpus)
    rows = Ordered(corpus.train, 3, 20 * 4)
    assert torch.equal(torch.stack(seen), torch.stack([row["input_ids"] for row in rows]))
    assert result["corpus"]["epochs"] == 20 * 4 / len(corpus.train)
    total, active = result["params"]["total"], result["params"]["active"]
    assert total - active == 2 * 2 * 3 * 32 * 64  # of 2 layers, 2 of 4 experts


def test_a_pass_over_all_of_a_small_validation_split(make: Make) -> None:
    rows = prepare(make().data).validation
    found = [module._validation(make(train={"eval_tokens": n}), rows) for n in (33, 10**9, None)]
    assert [len(each) for each in found] == [2, len(rows), len(rows)]


def test_the_share_of_the_peak_is_that_of_all_devices(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = list[Any]()
    trainer: Any = SimpleNamespace(
        config=make(),
        folder=SimpleNamespace(tensorboard=Path()),
        args=SimpleNamespace(device=torch.device("cpu"), world_size=4),
        remove_callback=lambda kind: None,
        add_callback=added.append,
    )
    monkeypatch.setattr(progress, "peak_flops", lambda device: 1e12)
    module._add_callbacks(trainer, [].append, 6, 0, None)
    assert [each.peak for each in added] == [4e12]
    # Of several processes the first one alone reports.
    told = list[Any]()
    monkeypatch.setattr(assemble, "reporter", lambda *args: told.append(args) or [])
    for main in (False, True):
        monkeypatch.setattr(module, "is_main_process", lambda main=main: main)
        module._add_callbacks(trainer, [].append, 6, 9, None)
        assert told == ([("none", Path(), 9)] if main else [])


def test_machines_may_differ_in_paths_alone(make: Make) -> None:
    here = make()
    own = {
        "out": "elsewhere",
        "data": dict.fromkeys(("cache_dir", "source", "validation", "tokenizer"), "x"),
        "train": {"report_to": "tensorboard", "precision": "fp32"},
    }
    assert module._common(with_overrides(here, own)) == module._common(here)
    for other in ({"train": {"timeout": 5}}, {"data": {"seq_len": 64}}, {"simreg": {"push": 0}}):
        assert module._common(with_overrides(here, other)) != module._common(here)


def test_too_little_memory_of_a_gpu_is_said_and_other_errors_are_left_alone() -> None:
    said = pytest.raises(UserError, match=r"out of memory: raise .*\(CUDA out of memory\)$")
    with said, module._out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory\nmore about it")
    with pytest.raises(RuntimeError, match="shapes differ"), module._out_of_memory():
        raise RuntimeError("shapes differ")


def test_a_loss_of_validation_that_is_nan_stops_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    original = loop.RunTrainer.log

    def log(self: loop.RunTrainer, logs: dict[str, float], *args: Any) -> None:
        late = "eval_ce" in logs and self.state.global_step == 14
        original(self, logs | ({"eval_ce": math.nan} if late else {}), *args)

    monkeypatch.setattr(loop.RunTrainer, "log", log)
    with pytest.raises(Diverged, match=r"ce of eval became NaN or infinite at step 14; .*0000007"):
        train(config)


def test_the_first_bad_step_is_the_one_that_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator it is looked for where a line is due, after further steps."""
    config = make(train={"tokens": 3 * 128, "evals": 1})
    steps = iter((math.inf, math.nan, 1.0))
    monkeypatch.setattr(loop.RunTrainer, "check_finite", lambda self: None)
    original = loop.SimRegTrainer.training_step

    def step(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) * 0 + next(steps)

    monkeypatch.setattr(loop.SimRegTrainer, "training_step", step)
    caught = list[loop.RunTrainer]()
    monkeypatch.setattr(loop.RunCallback, "_write", lambda self, *a: caught.append(self.trainer))
    with pytest.raises(UserError, match="lacks the evaluation"):  # no line was written
        train(config)
    assert int(caught[0]._bad_step) == 1


def test_a_run_in_a_thread_leaves_signals_alone() -> None:
    trainer, ended = SimpleNamespace(interrupted=False), []

    def run() -> None:
        with loop.interruptible(trainer):  # type: ignore[arg-type]
            ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [True]
