"""`simreg train` in several processes: one dies, hangs, is told to stop; their number changes."""

import dataclasses
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file

from simreg.recipe import assemble, checkpoints
from simreg.recipe import train as module
from simreg.recipe.config import RunConfig, to_yaml, with_overrides
from simreg.recipe.errors import UserError
from simreg.recipe.processes import check_replicated
from simreg.recipe.train import train
from tests.processes import free_port, launch
from tests.recipe import tiny
from tests.recipe.test_resume import interrupt_at

pytestmark = pytest.mark.usefixtures("one_thread")
PROGRAM = ["-m", "tests.recipe.tiny"]


def torchrun(
    processes: int, config: RunConfig, plan: str = "none", restarts: int = 0
) -> CompletedProcess[str]:
    """`simreg train` of the config, with a signal where `tiny` is told to send one."""
    file = Path(config.out).parent / "run.yaml"
    file.write_text(to_yaml(config))
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--standalone"]
    run = [sys.executable, "-m", "torch.distributed.run", *options, *PROGRAM, str(file), plan]
    # Else processes started again may read the addresses of those before them.
    [done] = launch(run, environments=[{"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}], limit=120)
    return done


def assert_close_run(one: RunConfig, other: RunConfig) -> None:
    """The same but for rounding; a record that a stop added has no counterpart."""
    expected = {(x["kind"], x["step"]): x for x in tiny.metrics(one.out)}
    actual = {(x["kind"], x["step"]): x for x in tiny.metrics(other.out)}
    assert expected.keys() <= actual.keys()
    for key, record in expected.items():
        assert actual[key].pop("kind") == record.pop("kind")
        assert actual[key] == pytest.approx(record, rel=2e-4, abs=1e-6), key
    a, b = (load_file(Path(c.out) / "model/model.safetensors") for c in (one, other))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> RunConfig:
    """The run of one process that nothing disturbed."""
    config = tiny.config(tmp_path_factory.mktemp("whole"), text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config)
    torch.set_num_threads(threads)
    return config


def test_a_killed_process_ends_the_run_and_the_same_command_continues(
    tmp_path: Path, text: Path, whole: RunConfig
) -> None:
    config = tiny.config(tmp_path, text)
    died = torchrun(4, config, "kill@step:9/2")
    assert died.returncode == 1
    # Which failed first is told by the second in which it was seen, and another may be named.
    assert re.findall(r"rank      : (\d) .*\n  exitcode  : -9 ", died.stderr) == ["2"]
    # The others say in a line that they lost contact, or are ended before they can: no traceback.
    assert "[rank" not in died.stderr
    assert [p.name for p in (Path(config.out) / "checkpoints").iterdir()] == ["step-0000007"]
    again = torchrun(4, config)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 7" in again.stdout
    assert again.stdout.count("step 20/20") == 2  # of training and validation, by one of the four
    assert_close_run(config, whole)


def test_torchrun_restarts_a_run_that_lost_a_process(
    tmp_path: Path, text: Path, whole: RunConfig
) -> None:
    config = tiny.config(tmp_path, text)
    done = torchrun(2, config, "kill@step:9/1", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 7" in done.stdout
    assert_close_run(config, whole)


def test_a_process_that_hangs_is_given_up(tmp_path: Path, text: Path) -> None:
    config = tiny.config(tmp_path, text, {"train": {"timeout": 3}})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [here | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    run = [sys.executable, *PROGRAM, str(file), "stop@step:9/1"]
    # Without a launcher, whose grace for a stopped process is 30 s: the first ends the second.
    done = launch(run, run, environments=ranks, limit=120, leader=True)
    assert done[0].returncode == 2
    assert "simreg: error: process 0 of 2 lost contact with another (Timed out waiting" in (
        done[0].stderr
    )
    assert "the same command continues from the last checkpoint" in done[0].stderr


def test_another_number_of_processes_continues(
    tmp_path: Path, text: Path, whole: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path, text)
    assert interrupt_at(9, config, tmp_path).startswith("stopped after step 9 ")
    # One process becomes two; Ctrl-C reaches one of them within a step, and both stop after it.
    two = torchrun(2, config, "int@step:15/1")
    assert two.returncode == 1
    assert "the number of processes was 1 and is 2: equal but for rounding" in two.stderr
    assert two.stderr.count("stopped after step 15 of 20, checkpoint saved; the same") == 2
    manifest = checkpoints.verify(Path(config.out) / "checkpoints/step-0000015")
    assert manifest["processes"] == 2
    # Two become one, with the same micro-batches.
    capsys.readouterr()
    train(with_overrides(config, {"train": {"accumulate": 2}}))
    assert "the number of processes was 2 and is 1" in capsys.readouterr().err
    assert_close_run(config, whole)


def test_machines_must_have_the_same_text(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path, text)
    of_main = iter([None, None, (None, {}, "another fingerprint", module._common(config))])
    monkeypatch.setattr(module, "from_main", lambda make: next(of_main))
    with pytest.raises(UserError, match=r"data\.source or data\.tokenizer is not the same on all"):
        train(config)


def test_machines_must_compute_alike(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path, text)
    theirs = module._common(config) | {"the precision": "bf16"}
    of_main = iter([None, None, (None, {}, "", theirs)])
    monkeypatch.setattr(module, "from_main", lambda make: next(of_main))
    with pytest.raises(
        UserError, match=r"the precision is fp32 here and bf16 in the first process"
    ):
        train(config)


def machines(*configs: RunConfig) -> list[CompletedProcess[str]]:
    """`simreg train` with a config of its own in each process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["WORLD_SIZE"] = str(len(configs))
    commands, environments = [], []
    for rank, config in enumerate(configs):
        file = Path(config.out).parent / f"{rank}.yaml"
        file.write_text(to_yaml(config))
        commands.append([sys.executable, *PROGRAM, str(file), "none"])
        environments.append(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    return launch(*commands, environments=environments, limit=120)


def test_machines_must_share_the_folder(tmp_path: Path, text: Path) -> None:
    config = tiny.config(tmp_path, text)
    elsewhere = tmp_path / "elsewhere/run"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.yaml").write_text(to_yaml(config))  # as a run before this one left it
    done = machines(config, dataclasses.replace(config, out=str(elsewhere)))
    assert [each.returncode for each in done] == [2, 2]
    assert f"{elsewhere} is not the same folder on all machines: choose an" in done[1].stderr
    assert not Path(config.out).exists()


def test_processes_must_have_one_config(tmp_path: Path, text: Path) -> None:
    config = tiny.config(tmp_path, text)
    other = {"optim": {"lr": 0.1}, "train": {"accumulate": 2, "report_to": "tensorboard"}}
    done = machines(config, with_overrides(config, other))
    assert [each.returncode for each in done] == [2, 2]
    assert (
        "must have one config: optim.lr is 0.1 here and 0.003 in the first process; "
        "train.accumulate is 2 here and 1 in the first process\n"
    ) in done[1].stderr
    assert "lost contact" in done[0].stderr
    assert Path(config.out, "metrics.jsonl").read_text() == ""


def test_what_mpi_starts_is_refused(tmp_path: Path, text: Path) -> None:
    """accelerate would meet, and each process train on the whole batch."""
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny.config(tmp_path, text)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    names = ("RANK", "LOCAL_RANK")
    environments = [
        shared
        | {f"OMPI_COMM_WORLD_{name}": str(rank) for name in names}
        | {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
        for rank in range(2)
    ]
    command = [sys.executable, *PROGRAM, str(file), "none"]
    done = launch(command, command, environments=environments, limit=120)
    assert [each.returncode for each in done] == [2, 2]
    for rank, each in enumerate(done):
        assert f"make this process 0 of 1, but it has met the others as {rank} of 2" in each.stderr
    assert not Path(tmp_path, "run", "metrics.jsonl").exists()


def test_processes_with_nowhere_to_meet_are_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"one of 2 processes, but .* no MASTER_ADDR, .*torchrun"):
        train(tiny.config(tmp_path, text))


@pytest.mark.parametrize("off", ["", "false", "False", "0", "no", "off"])
def test_sharding_that_is_off_is_not_refused(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", off)
    check_replicated()


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_sharding_by_accelerate_is_refused(
    name: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"told to use {name.lower()}, .* torchrun"):
        train(tiny.config(tmp_path, text))
    assert not Path(tmp_path, "run", "metrics.jsonl").exists()


def test_the_config_has_the_last_word_on_precision(
    tmp_path: Path, text: Path, whole: RunConfig
) -> None:
    """Not `accelerate launch`, by its flags or its config file."""
    config = tiny.config(tmp_path, text)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    told = {
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    [done] = launch([sys.executable, *PROGRAM, str(file), "none"], environments=[told], limit=120)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(Path(c.out) / "model/model.safetensors") for c in (whole, config))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("told", [("1", ""), ("0", "2"), ("1", "2")])
def test_half_of_a_launchers_variables_is_refused(
    told: tuple[str, str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "device", lambda: torch.device("cuda"))  # joins nobody by itself
    for name, value in zip(("RANK", "WORLD_SIZE"), told, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"process {told[0]} of {told[1] or 1}, .* as 0 of 1: sta"):
        train(tiny.config(tmp_path, text))
    assert not Path(tmp_path, "run", "metrics.jsonl").exists()
