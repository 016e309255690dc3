import types

import pytest

from simreg.recipe.folder import RunFolder
from simreg.study import plan, run
from tests.study.fakes import SPEED, made, write_run


class Lab:
    """Replaces training and timing; remembers what was asked of them."""

    def __init__(self, monkeypatch):
        self.trained, self.timed, self.before = [], [], lambda config: None
        self.tokens_per_s, self.ratio = 9000.0, 1.1
        self.draw, self.report = run.report.write, lambda *args: None
        self.corpus = types.SimpleNamespace(
            tokens=10**9,
            train=range(4_000_000),
            vocab_size=4096,
            fingerprint="f00d",
            require_batch=lambda rows: None,
        )
        monkeypatch.setattr(run.data, "prepare", lambda config: self.corpus)
        monkeypatch.setattr(run.train, "train", self.train)
        monkeypatch.setattr(run.timing, "throughput", lambda config, corpus: self.tokens_per_s)
        monkeypatch.setattr(run.timing, "step_time_ratio", self.step_time_ratio)
        monkeypatch.setattr(run.time, "sleep", self.sleep)
        monkeypatch.setattr(run.report, "write", lambda *args: self.report(*args))
        self.on_sleep = lambda: pytest.fail("waited for nobody")

    def train(self, config, *, corpus, on_step):
        folder = RunFolder(config.out)
        if (result := folder.finished(config)) is not None:
            return result
        with folder.claimed(config):
            self.before(config)
            self.trained.append(config.out)
            steps = config.steps
            record = {"kind": "eval", "step": steps, "steps": steps, "ce": 4.5, "tokens": 1_230_000}
            on_step(record)
            return write_run(config, SPEED if config.simreg.weight else 1.0)

    def step_time_ratio(self, base, arm, corpus, seconds):
        assert base.simreg.weight == 0
        self.timed.append(arm.simreg.weight)
        base_s = base.train.batch_rows * base.data.seq_len / self.tokens_per_s
        times = {"base_s": base_s, "arm_s": base_s * self.ratio, "n": 20}
        return {"ratio": self.ratio, "ratio_quartiles": [1.08, 1.13], **times}

    def sleep(self, seconds):
        self.on_sleep()


@pytest.fixture
def lab(monkeypatch):
    return Lab(monkeypatch)


@pytest.fixture
def study(tmp_path):
    base = {"train": {"tokens": 1_000_000, "eval_tokens": 5000}}
    return plan.from_dict({"out": str(tmp_path / "s"), "base": base})


@pytest.fixture(scope="session")
def five(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    speeds = {"fast": 1.35, "far": 1.9, "slow": 0.95}
    return made(folder, speeds, seeds=[0, 1, 2, 3, 4], name="five")
