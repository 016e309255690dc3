"""A run that is killed, interrupted or damaged ends as one that never was."""

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from simreg.recipe import checkpoints, loop, progress, provenance
from simreg.recipe.config import RunConfig, to_yaml, with_overrides
from simreg.recipe.errors import UserError
from simreg.recipe.folder import RunFolder
from simreg.recipe.loop import RunTrainer
from simreg.recipe.probe import Probe
from simreg.recipe.train import train
from tests.processes import popen
from tests.recipe import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, RunConfig]:
    """Runs that nothing disturbed."""
    runs = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for preset in tiny.PRESETS:
        folder = tmp_path_factory.mktemp(preset)
        runs[preset] = tiny.config(folder, text, {"model": {"preset": preset}})
        train(runs[preset])
    torch.set_num_threads(before)
    return runs


@pytest.mark.parametrize(
    ("preset", "where"),
    [("llama-test", "step:13"), ("mixtral-test", "step:10"), ("llama-test", "save:14")],
)
def test_killed_run_ends_the_same(
    tmp_path: Path, text: Path, whole: dict[str, RunConfig], preset: str, where: str
) -> None:
    config = tiny.config(tmp_path, text, {"model": {"preset": preset}})
    tiny.run_and_die(config, tmp_path, where)
    left = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    if where.startswith("save"):  # the half-written checkpoint is there, under no checkpoint's name
        assert left == [".step-0000014.partial", "step-0000007"]
    else:
        assert left == ["step-0000007"]
        assert not (tmp_path / "run/result.json").exists()
    result = train(config)
    tiny.assert_same_run(config, whole[preset])
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    assert not list((tmp_path / "run").glob("**/*.partial"))


def test_corrupt_checkpoint_falls_back(
    tmp_path: Path, text: Path, whole: dict[str, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path, text)
    interrupt_at(15, config, tmp_path)
    newest = tmp_path / "run/checkpoints/step-0000015/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    newest.write_bytes(content)
    train(config)
    error = capsys.readouterr().err
    assert "step-0000015 is corrupt (model.safetensors was altered" in error
    tiny.assert_same_run(config, whole["llama-test"])


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = checkpoints._sha256

    def fails(path: Path) -> str:
        if path.parent.name == "step-0000002":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    folder = RunFolder(tmp_path)
    for step in (1, 2):
        with checkpoints.new_folder(folder.checkpoints / f"step-{step:07d}") as aside:
            (aside / "model").write_text("weights")
            checkpoints.seal(aside, {"step": step, "corpus": "c"})
    monkeypatch.setattr(checkpoints, "_sha256", fails)
    assert folder.resume_point()[1]["step"] == 1
    assert "model cannot be read (Input/output error)" in capsys.readouterr().err


def interrupt_at(
    step: int, config: RunConfig, folder: Path, signals: Sequence[int] = (signal.SIGINT,)
) -> str:
    """Press Ctrl-C within a step, or send other signals; returns what the run says."""
    with sending(signals, step), pytest.raises(KeyboardInterrupt) as stopped:
        train(config)
    return str(stopped.value)


@contextmanager
def sending(signals: Sequence[int], step: int) -> Iterator[None]:
    """Signals to this process within a step of training."""
    original = loop.RunTrainer.training_step

    def press(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.RunTrainer, "training_step", press)
        yield


# Schedulers and launchers send SIGTERM, often both of them.
@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM, signal.SIGINT], [signal.SIGHUP]],
    ids=["int", "term", "hup"],
)
def test_interrupt_saves_and_says_how_to_resume(
    tmp_path: Path, text: Path, whole: dict[str, RunConfig], signals: list[int]
) -> None:
    config = tiny.config(tmp_path, text)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with hanging_up(signal.SIG_DFL):
        handlers = [signal.getsignal(number) for number in numbers]
        # 9 is a logging step: no line is added by stopping
        said = interrupt_at(9, config, tmp_path, signals)
        assert handlers == [signal.getsignal(number) for number in numbers]
    assert said.startswith("stopped after step 9 of 20, checkpoint saved; the same command")
    train(config)
    tiny.assert_same_run(config, whole["llama-test"])


@contextmanager
def hanging_up(handler: signal.Handlers) -> Iterator[None]:
    """What SIGHUP does before a run; these tests may run under nohup themselves."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_stops_nothing_under_nohup(tmp_path: Path, text: Path) -> None:
    with hanging_up(signal.SIG_IGN), sending([signal.SIGHUP], 9):
        assert train(tiny.config(tmp_path, text))["steps"] == tiny.STEPS


def test_a_closed_pipe_saves_and_stops(tmp_path: Path, text: Path) -> None:
    small = {"model": {"preset": "llama-tiny", "hidden_size": 32, "layers": 1}}
    config = tiny.config(tmp_path, text, small)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "simreg.cli", "train", str(file)]
    with popen(command) as process:
        assert process.stdout
        assert process.stderr
        while b"step" not in process.stdout.readline():
            pass
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(100) == 130, said
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert "checkpoint saved; the same command" in said
    assert any((tmp_path / "run/checkpoints").iterdir())


def test_a_second_interrupt_stops_at_once(tmp_path: Path, text: Path) -> None:
    config = tiny.config(tmp_path, text)
    presses = [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    said = interrupt_at(9, config, tmp_path, presses)
    assert said == "stopped at once; the same command continues from the last checkpoint"
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-0000007"]


def test_a_launcher_that_passes_an_interrupt_on_is_not_impatient(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer, now = SimpleNamespace(interrupted=False), 1.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    with loop.interruptible(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert trainer.interrupted
        now = 3.0
        with pytest.raises(KeyboardInterrupt, match="at once"):
            os.kill(os.getpid(), signal.SIGINT)


def test_training_seconds_are_carried_over(tmp_path: Path, text: Path) -> None:
    config = tiny.config(tmp_path, text)
    interrupt_at(9, config, tmp_path)
    seconds = checkpoints.verify(tmp_path / "run/checkpoints/step-0000009")["seconds"]
    assert seconds > 0
    train(config)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines]
    assert times == sorted(times)
    assert min(line["seconds"] for line in lines if line["step"] > 9) > seconds


def test_training_seconds_are_those_of_training(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour passes in each evaluation, checkpoint and analysis, a second from one step on."""
    passed, hours = [0.0], set[str]()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: passed[0])

    def slow(owner: type, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def later(*args: Any, **kwargs: Any) -> Any:
            passed[0] += seconds
            hours.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, later)

    slow(Trainer, "_evaluate", 3600)
    slow(RunTrainer, "_save_whole", 3600)
    slow(Probe, "__call__", 3600)
    slow(RunTrainer, "training_step", 1)
    config = tiny.config(tmp_path, text, {"train": {"analyze_every": 5}})
    assert train(config)["seconds"] == config.steps
    assert len(hours) == 4


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, text: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(text.read_bytes())
    config = tiny.config(tmp_path, mine)
    interrupt_at(9, config, tmp_path)
    mine.write_text(mine.read_text() + json.dumps({"text": "more " * 100}) + "\n")
    with pytest.raises(UserError, match=r"data of the run in .* has changed"):
        train(config)


def test_free_fields_may_change_on_resume_and_others_not(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path, text)
    interrupt_at(9, config, tmp_path)
    manifest = tmp_path / "run/checkpoints/step-0000009/manifest.json"
    assert json.loads(manifest.read_text())["precision"] == "fp32"
    manifest.write_text(manifest.read_text().replace("fp32", "bf16"))
    with pytest.raises(UserError, match=r"optim\.lr is 0\.003 there and 0\.001 now"):
        train(with_overrides(config, {"optim": {"lr": 1e-3}}))
    free = {"log_every": 5, "keep_checkpoints": 3, "gradient_checkpointing": True}
    result = train(with_overrides(config, {"train": free}))
    assert "train.precision was bf16 so far and is fp32 from here on" in capsys.readouterr().err
    assert result["steps"] == tiny.STEPS
    steps = [line["step"] for line in tiny.metrics(config.out) if line["kind"] == "train"]
    assert steps == [3, 6, 7, 9, 10, 14, 15, 20]


def test_what_trained_a_run_is_kept_over_resumes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path, text)
    for step, commit in ((5, "old"), (9, "old"), (12, "new"), (15, "old")):
        monkeypatch.setattr(provenance, "versions", lambda commit=commit: {"commit": commit})
        interrupt_at(step, config, tmp_path)
    result = train(config)
    assert [(each["from_step"], each["versions"]["commit"]) for each in result["earlier"]] == [
        (0, "old"),
        (9, "new"),
    ]
    assert result["versions"] == {"commit": "old"}
    assert result["earlier"][0].keys() == {
        "from_step",
        "versions",
        "machine",
        "precision",
        "processes",
    }


def test_lines_that_went_missing_are_told(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path, text)
    interrupt_at(9, config, tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[1:]))
    result = train(config)
    told = capsys.readouterr().err
    assert f"metrics.jsonl lacks 1 of its {len(lines)} lines up to step 9: curves have gaps" in told
    assert "earlier" not in result


MANIFEST = '{"files": {"weights": %s}, "step": 3, "corpus": "fingerprint"}'


def rename(file: Path, key: str) -> None:
    """A key of JSON, so that it is missing."""
    file.write_text(file.read_text().replace(f'"{key}"', '"another"'))


class TestCheckpoints:
    def save(self, folder: Path, step: int) -> Path:
        target = folder / checkpoints.folder_name(step)
        with checkpoints.new_folder(target) as aside:
            (aside / "weights").write_text("1234")
            checkpoints.seal(aside, {"step": step, "corpus": "fingerprint"})
        return target

    def test_an_intact_one_verifies(self, tmp_path: Path) -> None:
        assert checkpoints.verify(self.save(tmp_path, 3))["step"] == 3

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda p: (p / "weights").unlink(), "weights is missing"),
            (lambda p: (p / "weights").write_text("123"), "3 bytes, not 4"),
            (lambda p: (p / "weights").write_text("1235"), "altered"),
            (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
            (lambda p: (p / "manifest.json").write_text("{"), "unreadable"),
            (lambda p: rename(p / "manifest.json", "step"), "unreadable"),
            (lambda p: rename(p / "manifest.json", "corpus"), "unreadable"),
            (lambda p: (p / "manifest.json").write_text('{"files": {}}'), "unreadable"),
            (lambda p: (p / "manifest.json").write_text(MANIFEST % "{}"), "unreadable"),
            (lambda p: (p / "manifest.json").write_text(MANIFEST % "5"), "unreadable"),
            (lambda p: (p / "manifest.json").write_text(MANIFEST % '{"size": 4}'), "unreadable"),
        ],
    )
    def test_damage_is_found(self, tmp_path: Path, damage: Any, says: str) -> None:
        checkpoint = self.save(tmp_path, 3)
        damage(checkpoint)
        with pytest.raises(ValueError, match=says):
            checkpoints.verify(checkpoint)

    def test_every_file_is_looked_at(self, tmp_path: Path) -> None:
        names = ["model.safetensors", "optimizer.pt", "in/weights", "weights"]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("1234")
        checkpoints.seal(tmp_path, {"step": 3, "corpus": "fingerprint"})
        for name in names:
            (tmp_path / name).write_text("1235")
            with pytest.raises(ValueError, match=f"^{name} was altered"):
                checkpoints.verify(tmp_path)
            (tmp_path / name).write_text("1234")
        assert checkpoints.verify(tmp_path)["step"] == 3

    def test_a_failed_write_leaves_the_old_one(self, tmp_path: Path) -> None:
        checkpoint = self.save(tmp_path, 3)

        def fail() -> None:
            with checkpoints.new_folder(checkpoint) as aside:
                (aside / "weights").write_text("new")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert checkpoints.verify(checkpoint)["step"] == 3
        assert list(tmp_path.iterdir()) == [checkpoint]

    def test_pruning_keeps_the_newest_and_drops_the_passed_over(self, tmp_path: Path) -> None:
        for step in (1, 2, 3, 9):
            self.save(tmp_path, step)
        checkpoints.prune(tmp_path, step=3, keep=2)  # 9 was found corrupt: the run went back
        assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path)] == [3, 2]

    def test_what_takes_its_name_is_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And then the name: a machine may lose its power."""
        forced = []
        original = os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            forced.append((path.name.split(".")[1:2] or [path.name], target.exists()))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        target = tmp_path / "folder" / "new"
        with checkpoints.new_folder(target) as aside:
            (aside / "in.it").write_text("1")
        assert forced == [(["it"], False), (["new"], False), (["folder"], True)]
        forced.clear()
        target = tmp_path / "folder" / "file"
        checkpoints.write_atomically(target, "1")
        assert forced == [(["file"], False), (["folder"], True)]


@pytest.mark.parametrize("on_step", [None, [].append], ids=["alone", "of a study"])
def test_a_signal_in_the_last_evaluation_ends_what_the_run_is_part_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_step: Any
) -> None:
    """The run itself has nothing left to stop."""
    config = tiny.config(tmp_path / "run", tiny.write_text(tmp_path), {"train": {"evals": 1}})
    original = loop.RunTrainer._evaluate

    def evaluate(self: loop.RunTrainer, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(loop.RunTrainer, "_evaluate", evaluate)
    if on_step is None:
        assert train(config)["steps"] == config.steps
    else:
        with pytest.raises(KeyboardInterrupt, match="run, which is finished"):
            train(config, on_step=on_step)
    monkeypatch.undo()
    assert train(config)["steps"] == config.steps
