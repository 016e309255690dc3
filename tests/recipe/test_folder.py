"""A run's folder: what is recalled, refused, kept, and said of a disk that does not take it."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from simreg.recipe import checkpoints, models, outputs
from simreg.recipe import config as run_config
from simreg.recipe.config import RunConfig, with_overrides
from simreg.recipe.data import prepare
from simreg.recipe.errors import Diverged, Locked, UserError
from simreg.recipe.folder import RunFolder, native_errors, storage_errors
from simreg.recipe.locks import locked_folder
from simreg.recipe.outputs import unused
from simreg.recipe.train import train
from tests.recipe import tiny
from tests.recipe.tiny import Make


def test_finished_run_is_recalled_without_training(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    result = train(config)
    monkeypatch.setattr(models, "build", lambda *args, **kwargs: pytest.fail("trained again"))
    assert train(config) == result
    with pytest.raises(UserError, match=r"another config \(train\.seed is 0 there and 1 now\)"):
        train(with_overrides(config, {"train": {"seed": 1}}))


def test_a_run_that_another_process_finishes_meanwhile_is_recalled(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    result = train(config)
    seen, finished = [], RunFolder.finished

    def unseen_at_first(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
        seen.append(folder)
        return None if len(seen) == 1 else finished(folder, config)

    monkeypatch.setattr(RunFolder, "finished", unseen_at_first)
    monkeypatch.setattr(models, "build", lambda *args, **kwargs: pytest.fail("trained again"))
    assert train(config) == result


def test_second_process_is_refused(make: Make) -> None:
    config = make()
    Path(config.out).mkdir(parents=True)
    with (Path(config.out) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # any lock keeps a writer out
        with pytest.raises(Locked, match="another process is training in"):
            train(config)
    assert train(config)["steps"] == tiny.STEPS


def test_a_file_system_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(code: int) -> None:
        def flock(file: object, operation: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    for name in "ab":
        with locked_folder(tmp_path / name) as held:
            assert held
    assert capsys.readouterr().err.count("has no locks (No locks available)") == 1
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), locked_folder(tmp_path / "c"):
        pytest.fail("broken")
    with pytest.raises(UserError, match=r"c: Input/output error$"), outputs.held(tmp_path / "c"):
        pytest.fail("broken")


def test_folder_that_cannot_be_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write .*run.*choose another `out`$"):
        train(make())


def test_the_folder_of_a_study_is_none_of_a_run(make: Make) -> None:
    config = make()
    out = Path(config.out)
    out.mkdir(parents=True)
    (out / "study.yaml").write_text("name: s\n")
    with pytest.raises(UserError, match="is the folder of a study"):
        train(config)
    assert [path.name for path in out.iterdir()] == ["study.yaml"]


def test_a_run_does_not_begin_in_a_model_or_around_runs(make: Make) -> None:
    """Which could no longer be read there."""
    config = make()
    train(config)
    run = Path(config.out)
    for out, says in (
        (run / "model", "is the folder of a model"),
        (run.parent, "holds runs, run "),
    ):
        with pytest.raises(UserError, match=says):
            train(with_overrides(config, {"out": str(out)}))
        assert not (out / "config.yaml").exists()


def test_what_no_run_wrote_is_kept(make: Make) -> None:
    config = make()
    out = Path(config.out)
    (out / "model").mkdir(parents=True)
    precious = out / "model" / "net.py"
    precious.write_text("precious")
    with pytest.raises(UserError, match=r"there is a .*model already; no run of simreg wrote it"):
        train(config)
    assert precious.read_text() == "precious"
    other = out / "metrics.jsonl", out / "result.json", out / "checkpoints" / "step-5000" / "x"
    for path in other:  # of another program, which names its files as a run does
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"step": 100, "loss": 3.1}\n')
        with pytest.raises(UserError, match=r"there is a .* already; no run of simreg wrote it"):
            train(config)
        assert path.read_text() == '{"step": 100, "loss": 3.1}\n'
        assert precious.read_text() == "precious"
        path.unlink()
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    plain = "a: 1\n", "optim:\n  lr: 0.001\n", "- a\n"
    for text in (
        "optim: {lr: 0.001}\n",
        "# mine\n" + run_config.to_yaml(config),
        "name: [",
        "",
        *plain,
    ):
        (out / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"there is a .*config\.yaml already"):
            train(config)
        assert (out / "config.yaml").read_text() == text
    (out / "config.yaml").write_text(run_config.to_yaml(config))  # of a run that failed at once
    assert train(config)["steps"] == tiny.STEPS


def test_a_missing_file_elsewhere_is_not_about_the_folder(tmp_path: Path) -> None:
    for missing, error in (
        (tmp_path / "run" / "x", UserError),
        (tmp_path / "gone", UserError),
        (tmp_path, FileNotFoundError),
        ("", FileNotFoundError),
        ("/sbin/none", FileNotFoundError),
    ):
        root = tmp_path / ("gone/run" if Path(missing).name == "gone" else "run")
        with pytest.raises(error), storage_errors(root):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(missing))


def test_a_run_that_has_saved_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-0000007").mkdir(parents=True)
    continues = r"`out`; the same command continues from the last"
    with pytest.raises(UserError, match=continues), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))


def test_full_disk_is_reported_and_the_run_goes_on_afterwards(make: Make) -> None:
    config = make()
    corpus = prepare(config.data)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(UserError, match=r"cannot write .*step-0000007.*make room.*`out`$"):
            train(config, corpus=corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((Path(config.out) / "checkpoints").iterdir())
    assert train(config, corpus=corpus)["steps"] == tiny.STEPS


def test_full_disk_at_the_end_loses_nothing(make: Make) -> None:
    config = make()
    corpus = prepare(config.data)
    expected = train(config, corpus=corpus)["final_ce"]
    shutil.rmtree(Path(config.out) / "model")
    (Path(config.out) / "result.json").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*model.*make room"):
            train(config, corpus=corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert train(config, corpus=corpus)["final_ce"] == expected
    assert (Path(config.out) / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
        SafetensorError("Error while serializing: I/O error: File too large"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_the_words_of_native_writers(tmp_path: Path, error: Exception) -> None:
    words = pytest.raises(UserError, match="make room")
    with words, storage_errors(tmp_path), native_errors(tmp_path / "x"):
        raise error


def test_other_errors_of_native_writers_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no tensor"), native_errors(tmp_path):
        raise RuntimeError("no tensor")


def test_the_result_is_of_the_last_step(make: Make) -> None:
    config = make()
    out = Path(config.out)
    train(config)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if a backup had been put back
    with pytest.raises(UserError, match="lacks the evaluation after the last step"):
        train(config)
    assert not (out / "result.json").exists()
    shutil.rmtree(out / "checkpoints" / "step-0000020")
    assert train(config)["final_ce"] == json.loads(lines[-1])["ce"]


def test_a_command_that_failed_early_claims_nothing(make: Make) -> None:
    with pytest.raises(UserError, match="there is no file"):
        train(make(data={"source": "missing.txt"}))
    assert not Path(make().out).exists()
    config = Path(make().out) / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(run_config.to_yaml(make()))  # by hand: it is not ours to remove
    with pytest.raises(UserError, match="there is no file"):
        train(make(data={"source": "missing.txt"}))
    assert config.exists()
    (Path(make().out) / "metrics.jsonl").touch()  # as where the device was full in step 1
    assert train(make())["steps"] == tiny.STEPS


def test_a_model_that_cannot_be_is_said_before_another_run_is_found(make: Make) -> None:
    with pytest.raises(UserError, match="no preset 'llama-3b'"):
        train(make(model={"preset": "llama-3b"}))
    assert not Path(make().out).exists()
    train(make())
    with pytest.raises(UserError, match="no preset 'llama-3b'"):
        train(make(model={"preset": "llama-3b"}))


def test_a_run_that_diverged_before_it_wrote_anything_is_of_its_config(make: Make) -> None:
    config = make()
    folder = RunFolder(config.out)
    with pytest.raises(Diverged), folder.claimed(config):
        raise Diverged("NaN at step 1")
    folder.record_divergence("NaN at step 1")
    assert folder.diverged(config) == "NaN at step 1"
    with pytest.raises(UserError, match=r"another config \(train\.seed is 0 there and 1 now\)"):
        folder.diverged(with_overrides(config, {"train": {"seed": 1}}))


def test_a_run_of_before_an_option_is_none_with_it(make: Make) -> None:
    config = make(simreg={"push": 0.0, "depths": [], "schedule": "constant"})
    folder = RunFolder(config.out)
    folder.root.mkdir(parents=True)
    folder.metrics.write_text('{"step": 1}\n')
    lines = run_config.to_yaml(config).splitlines()
    later = (" push: ", " depths: ")
    before = [line for line in lines if not any(name in line for name in later)]
    assert len(before) == len(lines) - 2
    folder.config.write_text("\n".join(before))
    folder.check(config)
    with pytest.raises(UserError, match=r"simreg\.push is 0\.0 there and 3\.333 now"):
        folder.check(with_overrides(config, {"simreg": {"push": 3.333}}))
    with pytest.raises(UserError, match=r"simreg\.depths is \[\] there and \[0\.5\] now"):
        folder.check(with_overrides(config, {"simreg": {"depths": [0.5]}}))


@pytest.mark.parametrize(
    ("depths", "said", "other"), [([0.5], 1, 0), ([0.25, 0.5], [-2, 1], 1), ([], [2, 1], None)]
)
def test_labels_by_default_are_those(make: Make, depths: Any, said: Any, other: Any) -> None:
    config = make(simreg={"depths": depths}, model={"layers": 4})
    folder = RunFolder(config.out)
    folder.root.mkdir(parents=True)
    folder.metrics.write_text('{"step": 1}\n')
    folder.config.write_text(run_config.to_yaml(config))
    folder.check(with_overrides(config, {"simreg": {"depths_offset": said}}))
    if other is not None:
        says = rf"simreg\.depths_offset is None there and {other} now"
        with pytest.raises(UserError, match=says):
            folder.check(with_overrides(config, {"simreg": {"depths_offset": other}}))


def test_without_weight_the_rest_of_simreg_may_differ(make: Make) -> None:
    config = make(simreg={"weight": 0})
    folder = RunFolder(config.out)
    folder.root.mkdir(parents=True)
    folder.metrics.write_text('{"step": 1}\n')
    folder.config.write_text(run_config.to_yaml(config))
    folder.check(with_overrides(config, {"simreg": {"depths": [], "push": 1.0}}))
    other = {"auxiliary": {"name": "simctg"}, "simreg": {"depths": []}}
    folder.config.write_text(run_config.to_yaml(with_overrides(config, other)))
    folder.check(with_overrides(config, {**other, "simreg": {"push": 1.0}}))
    with pytest.raises(UserError, match=r"config \(simreg\.scope is row there and document now\)"):
        folder.check(with_overrides(config, {**other, "simreg": {"scope": "document"}}))
    for there, here in ((0, 0.3), (0.3, 0), (0.3, 0.3)):
        saved = with_overrides(config, {"simreg": {"weight": there}})
        folder.config.write_text(run_config.to_yaml(saved))
        with pytest.raises(UserError, match=r"depths is \[0\.25, 0\.5\] there and \[\] now"):
            folder.check(with_overrides(config, {"simreg": {"weight": here, "depths": []}}))


def test_results_of_another_command_line_have_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "eval"
    for command, name in (("a", "eval"), ("b", "eval-2"), ("c", "eval-3"), ("b", "eval-2")):
        with unused(folder, command) as found:
            assert found == folder.with_name(name)
            (found / "results.json").write_text(json.dumps({"command": command}))
    for text in ("[1]", "{", "{}", ""):
        (folder / "results.json").write_text(text)
        with unused(folder, "a") as found:
            assert found.name == "eval-4"


def test_commands_at_once_have_a_folder_each(tmp_path: Path) -> None:
    with unused(tmp_path / "eval", "a") as first, unused(tmp_path / "eval", "b") as second:
        assert [first.name, second.name] == ["eval", "eval-2"]
    with unused(tmp_path / "eval", "b") as found:  # what failed has kept nothing
        assert found.name == "eval"


def test_a_folder_that_two_would_write_into_is_the_first_ones(tmp_path: Path) -> None:
    with outputs.folder(tmp_path / "out", "suite", "simreg eval") as found:
        assert found.is_dir()
        with (
            pytest.raises(UserError, match=f"another command is at work in {found}: wait for it"),
            outputs.folder(found, "suite", "simreg eval"),
        ):
            pytest.fail("two at once")
        assert (found / ".lock").is_file()  # who came later has not removed it


def test_what_fails_leaves_no_empty_folders(tmp_path: Path) -> None:
    def fail(folder: Path, *files: str) -> None:
        with contextlib.suppress(ZeroDivisionError), locked_folder(folder):
            for file in files:
                (folder / file).touch()
            raise ZeroDivisionError

    fail(tmp_path / "a" / "b" / "c")
    assert not [*tmp_path.iterdir()]
    fail(tmp_path / "a" / "b", "mine")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["mine"]
    fail(tmp_path / "a" / "c")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    (tmp_path / "own").mkdir()
    fail(tmp_path / "own")
    assert (tmp_path / "own").is_dir()  # it was there before

    def move() -> None:
        with locked_folder(tmp_path / "gone"):
            shutil.rmtree(tmp_path / "gone")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # not that the folder has gone
        move()
    with locked_folder(tmp_path / "done"):
        pass
    assert not [*(tmp_path / "done").iterdir()]


def test_results_that_come_before_the_folder_is_held_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def late(path: Path, waiting: object) -> Iterator[bool]:
        path.mkdir()
        (path / "results.json").write_text('{"positive_rate": 1}')
        yield True

    monkeypatch.setattr(outputs, "locked_folder", late)
    with (
        pytest.raises(UserError, match="that `simreg eval` did not write"),
        outputs.folder(tmp_path / "out", "suite", "simreg eval"),
    ):
        pytest.fail("would replace them")


def test_who_waits_for_a_folder_that_goes_makes_it_again(tmp_path: Path) -> None:
    folder, waits, entered = tmp_path / "out", threading.Event(), []

    def other() -> None:
        with locked_folder(folder, waits.set) as held:
            entered.append(held and (folder / ".lock").is_file())
            with locked_folder(folder) as twice:
                entered.append(twice)

    thread = threading.Thread(target=other)
    with contextlib.suppress(ZeroDivisionError), locked_folder(folder):
        thread.start()
        waits.wait(30)
        raise ZeroDivisionError
    thread.join(30)
    assert entered == [True, False]


def test_results_that_come_while_a_folder_is_taken_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def late(path: Path, waiting: object) -> Iterator[bool]:
        path.mkdir(parents=True)
        if path.name == "eval":
            (path / "results.json").write_text('{"command": "a"}')
        yield True

    monkeypatch.setattr(outputs, "locked_folder", late)
    with unused(tmp_path / "eval", "b") as found:
        assert found.name == "eval-2"


def test_a_long_list_is_told_by_its_length(make: Make) -> None:
    config = make(data={"source": [f"{i}.txt" for i in range(30)]})
    folder = RunFolder(config.out)
    folder.root.mkdir(parents=True)
    folder.metrics.write_text('{"step": 1}\n')
    folder.config.write_text(run_config.to_yaml(config))
    message = r"data\.source is a list of 30 that begins with 0\.txt there and \*\.txt now"
    with pytest.raises(UserError, match=message):
        folder.check(with_overrides(config, {"data": {"source": "*.txt"}}))


def test_a_file_that_several_write_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def write(who: int) -> None:
        for _ in range(50):
            checkpoints.write_atomically(path, json.dumps([who] * 2000))
            found = json.loads(path.read_text())
            assert found == [found[0]] * 2000

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with pytest.raises(UnicodeEncodeError):
        checkpoints.write_atomically(path, "\ud800")
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("content", ["[]", "{}", '{"final_ce": '])
def test_a_damaged_result_is_not_taken_for_one(make: Make, content: str) -> None:
    config = make()
    train(config)
    (Path(config.out) / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result.json is damaged: delete it"):
        train(config)


@pytest.mark.parametrize("line", ["{not json", '{"kind": "train"}', '{"step": 5}', "5"])
def test_damaged_metrics_are_named(make: Make, line: str) -> None:
    config = make()
    train(config)
    (Path(config.out) / "result.json").unlink()
    (Path(config.out) / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        train(config)


@pytest.mark.parametrize("out", ["x" * 300, "~nosuchuser/run"])
def test_odd_folder_names_end_in_one_line(
    make: Make, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_overrides(make(), {"out": out})
    if out.startswith("~"):
        assert train(config)["steps"] == tiny.STEPS  # no such user: a folder like any other
        assert (tmp_path / out / "result.json").exists()
    else:
        with pytest.raises(UserError, match="File name too long"):
            train(config)
