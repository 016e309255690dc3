"""The command line: statuses, one-line errors, help."""

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from simreg import __version__, cli
from simreg.recipe import config as recipe
from simreg.recipe import train as train_module
from simreg.recipe.config import RunConfig, to_yaml
from simreg.recipe.errors import UserError
from tests.processes import popen


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """What `simreg train` would train."""
    configs: list[RunConfig] = []
    monkeypatch.setattr(train_module, "train", configs.append)
    return configs


def test_defaults_then_file_then_flags(tmp_path: Path, seen: list[RunConfig]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 0.001, warmup: 0.2}\n")
    assert cli.main(["train", str(file), "--optim.lr", "2e-3", "--data.source", "a", "b"]) == 0
    assert seen[0].optim.lr == 2e-3
    assert seen[0].optim.warmup == 0.2
    assert seen[0].data.source == ["a", "b"]
    assert seen[0].train == RunConfig().train


def test_the_change_log_says_how_a_folder_from_before_is_resumed(seen: list[RunConfig]) -> None:
    text = Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    [flags] = re.findall(r"resume it with `(--simreg\.push [^`]*)`", text)
    assert cli.main(["train", *flags.split()]) == 0
    assert seen == [recipe.with_overrides(RunConfig(), recipe.BEFORE)]


def test_a_run_that_succeeds_ends_the_group_of_processes(
    tmp_path: Path, seen: list[RunConfig]
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert cli.main(["train"]) == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


ABORTS = """
import atexit, os, sys, threading, time
from simreg import cli

class Late:
    abort = os.abort
    def __del__(self):
        self.abort()  # as a thread of gloo's, once the interpreter is being taken down

late = Late()
atexit.register(print, "early handler")

def main():
    atexit.register(print, "late handler")
    threading.Thread(target=lambda: time.sleep(0.5) or print("thread")).start()
    return {status}

cli.main = main
cli.run()
"""


@pytest.mark.parametrize(("processes", "status", "expected"), [(2, 0, 0), (2, 2, 2), (1, 0, -6)])
def test_one_of_several_processes_leaves_out_finalization(
    processes: int, status: int, expected: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABORTS.format(status=status)],
        env=os.environ | {"WORLD_SIZE": str(processes), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expected, done.stderr
    assert done.stdout == "thread\nlate handler\nearly handler\n"


def test_a_closed_output_is_no_failure_of_one_of_several_processes() -> None:
    code = "from simreg import cli; cli.main = lambda: 0; cli.run()"
    for closed in (">&-", "2>&-", "| true"):
        command = f'set -o pipefail; "{sys.executable}" -c "{code}" {closed}'
        done = subprocess.run(
            ["bash", "-c", command],
            env=os.environ | {"WORLD_SIZE": "2"},
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, (closed, done.stderr)


def test_several_processes_end_as_one_does_where_nothing_was_run() -> None:
    command = [sys.executable, "-m", "simreg.cli", "no-such-verb"]
    done = subprocess.run(
        command, env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, timeout=300
    )
    assert done.returncode == 2
    assert b"no-such-verb" in done.stderr
    assert b"Traceback" not in done.stderr


def test_options_of_another_loss(tmp_path: Path, seen: list[RunConfig]) -> None:
    command = ["train", "--auxiliary.name", "dispersion", "--auxiliary.options"]
    assert cli.main([*command, "weight=1e-3", "depths=[0.5, 1]", "--optim.lr", "0.5"]) == 0
    assert seen[0].auxiliary.options == {"weight": 0.001, "depths": [0.5, 1]}
    assert seen[0].optim.lr == 0.5
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(seen[0]))
    assert cli.main(["train", str(file)]) == 0
    assert seen[1] == seen[0]


def test_values_that_are_none_one_or_many(seen: list[RunConfig]) -> None:
    flags = "--data.source a --simreg.chunk-size None --train.eval-tokens 5 --train.compile"
    cli.main(["train", *flags.split()])
    assert seen[0].data.source == "a"
    assert seen[0].simreg.chunk_size is None
    assert seen[0].train.eval_tokens == 5
    assert seen[0].train.compile is True


@pytest.mark.parametrize(("word", "means"), [("2e6", 2_000_000), ("1.5e6", 1_500_000), ("7", 7)])
def test_counts_may_be_powers_of_ten(seen: list[RunConfig], word: str, means: int) -> None:
    cli.main(["train", "--train.tokens", word, "--train.eval-tokens", word])
    assert (seen[0].train.tokens, seen[0].train.eval_tokens) == (means, means)
    assert type(seen[0].train.tokens) is int


@pytest.mark.parametrize("word", ["2.5e0", "2.5", "1e-3", "many"])
def test_what_is_no_count_is_refused(
    seen: list[RunConfig], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--train.tokens", word])
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--train.tokens" in error
    assert f"{word} is not a whole number (1e6 and 2_000 are)" in error
    assert not seen


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--optim.lr", "-1"], "optim.lr: Input should be greater than 0"),
        (["--train.accumulate", "3"], "train.accumulate=3 does not divide"),
        (["absent.yaml"], "cannot read absent.yaml"),
        (
            ["--out", "runs/y", "run.yaml"],
            "run.yaml: there is one config file, and it",
        ),
        (["a.yaml", "b.yml"], "b.yml: there is one config file"),
        (["--optim.lr=1e-3", "run.yaml"], "run.yaml: there is one config file"),
        (["--simreg.push", "-1", "run.yaml"], "run.yaml: there is one config file"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], seen: list[RunConfig]
) -> None:
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"simreg: error: {says}")
    assert error.count("\n") == 1
    assert not seen


@pytest.mark.parametrize(
    "arguments",
    [
        "train --data.source absent.txt",
        "compare --data absent.txt --tokens 1e6 --out runs/a/b",
        "eval ./absent",
        "eval ./absent --out a/b",
        "analyze ./absent",
    ],
)
def test_a_command_that_fails_leaves_nothing(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "arguments",
    ["run.yaml --optim.lr 1e-3", "--data.source x.yaml", "--auxiliary.options a=1 b=x.yaml"],
)
def test_yaml_files_in_their_place(arguments: str) -> None:
    cli._check_place(arguments.split())


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--no-such-flag"]])
def test_wrong_usage_exits_with_2(arguments: list[str], seen: list[RunConfig]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "simreg", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"simreg {__version__}\n"


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (UserError("no such thing"), 2, "simreg: error: no such thing\n"),
        (KeyboardInterrupt("stopped after step 3"), 130, "simreg: stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "simreg: interrupted\n"),
        (
            PermissionError(13, "Permission denied", "runs/a/result.json"),
            2,
            "simreg: error: runs/a/result.json: Permission denied\n",
        ),
        (PermissionError(13, "Not allowed"), 2, "simreg: error: a file: Not allowed\n"),
        (
            ModuleNotFoundError("No module named 'tyro.conf'", name="tyro.conf"),
            2,
            "simreg: error: tyro.conf is not installed: pip install -e '.[train]' in the "
            "checkout\n",
        ),
    ],
)
def test_what_a_run_raises(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    says: str,
) -> None:
    def fail(config: RunConfig) -> None:
        raise raised

    monkeypatch.setattr(train_module, "train", fail)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == says


def test_a_module_of_ours_that_is_missing_is_a_failure_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: RunConfig) -> None:
        raise ModuleNotFoundError("No module named 'simreg.none'", name="simreg.none")

    monkeypatch.setattr(train_module, "train", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])


def test_what_the_commands_need_is_what_the_extra_installs() -> None:
    extra = {
        re.split("[^a-z-]", line.lower())[0]
        for line in requires("simreg") or []
        if "extra == 'train'" in line.replace('"', "'")
    }
    modules = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    needed = {modules.get(name, name) for name in cli._NEEDED}
    assert needed == extra - {"tensorboard"}  # of which the message is one of its own


@pytest.mark.parametrize("arguments", ["plan --table", "train --list-models"])
def test_a_reader_that_leaves_is_no_failure(arguments: str) -> None:
    command = [sys.executable, "-m", "simreg.cli", *arguments.split()]
    with popen(command) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(100) == 141


def test_list_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--list-models"]) == 0
    text = capsys.readouterr().out
    assert "a vocabulary of 32,000" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["llama-60m"] == ["58.07M", "58.07M"]
    assert lines["mixtral-8x7b"] == ["46702.79M", "12879.93M"]


@pytest.mark.parametrize("verb", ["train", "compare", "eval", "bench", "plan"])
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: simreg {verb}" in text
    assert "(default: " in text


def test_version_and_help_do_not_load_transformers() -> None:
    code = (
        "import sys; from simreg import cli\n"
        "for flags in (['--version'], ['--help'], ['train', '--help']):\n"
        "    try: cli.main(flags)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"simreg {__version__}\n")


@pytest.mark.parametrize(
    ("flags", "name", "options"),
    [
        ("--auxiliary.name z-loss --auxiliary.options weight=1e-3", "z-loss", {"weight": 1e-3}),
        ("--auxiliary.options depth=0.5", "nitp", {"depth": 0.5}),
        ("--auxiliary.name mtp --auxiliary.options", "mtp", {}),
        ("--auxiliary.name cosine", "cosine", {}),
        ("--auxiliary.name=mtp", "mtp", {}),
        ("--auxiliary.name nitp", "nitp", {"weight": 1e-1, "depth": 0.3}),
        ("--auxiliary.name None", None, {}),
        ("--optim.lr 1", "nitp", {"weight": 1e-1, "depth": 0.3}),
        (
            "--auxiliary.name simreg-variant --auxiliary.options depths=[0.5] final=true",
            "simreg-variant",
            {"depths": [0.5], "final": True},
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_train_reads_options_of_an_auxiliary_loss(
    seen: list[RunConfig], tmp_path: Path, flags: str, name: str | None, options: dict[str, Any]
) -> None:
    """Flags replace those of the file or of another loss; a number without a point is one."""
    file = tmp_path / "c.yaml"
    file.write_text("auxiliary: {name: nitp, options: {weight: 1e-1, depth: 0.3}}", "utf-8")
    assert cli.main(["train", str(file), *flags.split()]) == 0
    assert (seen[0].auxiliary.name, seen[0].auxiliary.options) == (name, options)


@pytest.mark.parametrize("options", ["weight", "weight={", "=3"])
def test_options_that_are_not_assigned_are_named(
    seen: list[RunConfig], capsys: pytest.CaptureFixture[str], options: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--auxiliary.name", "mtp", "--auxiliary.options", *options.split()])
    assert "KEY=VALUE" in capsys.readouterr().err
    assert not seen
