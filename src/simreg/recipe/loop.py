"""The Trainer of a run: when to log, evaluate and save, and what must never be saved."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from simreg.integrations.following import Following
from simreg.integrations.transformers import SimRegTrainer
from simreg.objectives import Sum
from simreg.recipe import assemble, checkpoints
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import Diverged
from simreg.recipe.folder import RunFolder, native_errors, storage_errors
from simreg.recipe.muon import MuonAdamW
from simreg.recipe.probe import Probe
from simreg.recipe.processes import is_main_process, world_size
from simreg.recipe.progress import Clock, MetricsFile

_OBJECTIVE_KEYS = ("simreg", "pos_cos", "neg_cos", "pos_fraction")
_FURTHER_KEYS = ("router_loss", "auxiliary", "earlier", "simreg_weight")  # where there are any
_ECHO = 1.0  # seconds within which a launcher passes on a signal that the process has had itself


class RunTrainer(SimRegTrainer):
    """Trainer with this project's checkpoints, its clock, and a guard against NaN."""

    def __init__(
        self,
        *,
        config: RunConfig,
        folder: RunFolder,
        clock: Clock,
        corpus: str,
        origins: list[dict[str, Any]],
        **kwargs: Any,
    ) -> None:
        """Every checkpoint keeps `corpus`, the fingerprint of the data, and `origins`: versions and
        machines, each from which step on."""
        super().__init__(schedule=config.simreg.over_run, **kwargs)
        self._rival: Following | None = None
        if isinstance(objective := kwargs.get("objective"), Sum):
            self._rival = Following(objective.auxiliary, config.auxiliary.over_run)
        self.config, self.folder, self.clock = config, folder, clock
        self.corpus, self.origins = corpus, origins
        self.interrupted = False  # this process was asked to stop
        self.stopping = False  # all of them stop after this step
        self.metrics_file: MetricsFile | None = None
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as `Trainer` makes it, or Muon."""
        if self.config.optim.name == "muon" and self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = MuonAdamW(trained, self.config.optim)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; remembers, on the device, the first step whose loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        news = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_step = torch.where(news, self.state.global_step + 1, self._bad_step)
        return loss

    def _follow_schedule(self) -> None:
        super()._follow_schedule()
        if self._rival is not None and self.is_in_train:
            self._rival.at(self.state.global_step / self.state.max_steps)

    def check_finite(self) -> None:
        """UserError if a loss since the start was not finite (waits for the device)."""
        if step := int(self._bad_step):
            self.diverged(f"the loss became NaN or infinite at step {step}")

    def agree_to_stop(self) -> None:
        """A signal reaches each process in a step of its own; all stop after the same one."""
        self.stopping = self.interrupted
        if self.args.world_size > 1:
            asked = torch.tensor(float(self.interrupted), device=self.args.device)
            self.stopping = bool(self.accelerator.reduce(asked, "sum"))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the run reports MFU itself, and counting parameters at every step costs time."""
        return 0

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.paused():
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a temporary folder, which takes its name only when it is whole."""
        with self.clock.paused():
            if not all(bool(p.isfinite().all()) for p in model.parameters()):
                self.diverged(
                    f"the weights became NaN or infinite by step {self.state.global_step}"
                )
            self._save_whole(model, trial)
        if self.stopping:
            raise KeyboardInterrupt(
                f"stopped after step {self.state.global_step} of {self.state.max_steps}, "
                "checkpoint saved; the same command continues from there"
            )

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        target = self.folder.checkpoints / checkpoints.folder_name(step)
        if not is_main_process():  # the others add their random state to what the main one saves
            self._save_into(checkpoints.aside(target), model, trial)
            return
        with (
            storage_errors(target),
            native_errors(target),
            checkpoints.new_folder(target) as aside,
        ):
            self._save_into(aside, model, trial)
            saved = aside / f"checkpoint-{step}"
            for path in saved.iterdir():
                path.rename(aside / path.name)
            saved.rmdir()
            facts: dict[str, Any] = {
                "step": step,
                "seconds": self.clock.seconds,
                "corpus": self.corpus,
                "processes": self.args.world_size,
                "accumulate": self.config.train.accumulate,
                "precision": assemble.precision(self.config),
                "origins": self.origins,
            }
            if self.metrics_file is not None:
                self.metrics_file.sync()
                facts["lines"] = self.metrics_file.lines
            checkpoints.seal(aside, facts)
        checkpoints.prune(self.folder.checkpoints, step, self.config.train.keep_checkpoints)

    def _save_into(self, folder: Path, model: nn.Module, trial: Any) -> None:
        given, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
        finally:
            self.args.output_dir = given

    def diverged(self, problem: str) -> NoReturn:
        """Stop the run, naming what to do and the checkpoint that is left."""
        saved = checkpoints.found(self.folder.checkpoints)
        last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        advice = ["lower optim.lr", "lengthen optim.warmup"]
        advice += [] if self.config.optim.clip else ["set optim.clip"]
        advice += ["lower simreg.weight"] if self.config.simreg.weight else []
        raise Diverged(f"{problem}; {last}; {', '.join(advice[:-1])} or {advice[-1]}")


class RunCallback(TrainerCallback):
    """Decides at each step what is due, and turns log records into lines of metrics.jsonl."""

    def __init__(
        self,
        trainer: RunTrainer,
        *,
        flops_per_token: int,
        peak: float | None,
        tell: Callable[[dict[str, Any]], None],
        probe: Probe | None = None,
    ) -> None:
        """`peak`: FLOP/s of all devices together, None if unknown; `tell` receives each record."""
        self.trainer, self.tell, self.probe = trainer, tell, probe
        self.flops_per_token, self.peak = flops_per_token, peak
        config = trainer.config
        self.steps, evals = config.steps, config.train.evals
        self.eval_steps = {math.ceil(self.steps * k / evals) for k in range(1, evals + 1)}
        self.tokens_per_step = config.tokens_per_step
        self._began = self._last = (0, 0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = (state.global_step, time.perf_counter())
        self._last = (state.global_step, self.trainer.clock.seconds)
        self.trainer.clock.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set what is due after this step."""
        step, train = state.global_step, self.trainer.config.train
        if self.probe is not None and train.analyze_every and step % train.analyze_every == 0:
            self._look(self.probe, state)  # first, as what it logs resets control.should_log
        control.should_evaluate = step in self.eval_steps
        regular = control.should_evaluate
        if train.save_every is not None:
            regular = step % train.save_every == 0
        control.should_save = regular or step == self.steps
        due = control.should_evaluate or control.should_save or step % train.log_every == 0
        waits = args.device.type != "cpu"  # there looking means waiting for the device
        if due or not waits:
            self.trainer.check_finite()
        if due or not waits or args.world_size == 1:
            self.trainer.agree_to_stop()
        control.should_save |= self.trainer.stopping
        # A checkpoint falls between two logging windows, so that a resumed run logs the same means.
        control.should_log = due or control.should_save

    def _look(self, probe: Probe, state: TrainerState) -> None:
        """Record the geometry; the clock stands still, as it does for an evaluation."""
        self.trainer.check_finite()
        with self.trainer.clock.paused():
            found = probe(self.trainer)
            self._write({"kind": "geometry", **self._position(state), **found}, state)
            logs = {f"geometry_{key}": v for key, v in found.items() if v is not None}
            self.trainer.log(logs)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the record, if it is one of training or evaluation."""
        logs = logs or {}
        if "eval_ce" in logs:
            self._write({"kind": "eval", **self._position(state), "ce": logs["eval_ce"]}, state)
        elif "grad_norm" in logs:
            self._write(self._train_record(state, logs), state)

    def _position(self, state: TrainerState) -> dict[str, Any]:
        step = state.global_step
        seconds = self.trainer.clock.seconds
        return {"step": step, "tokens": step * self.tokens_per_step, "seconds": seconds}

    def _train_record(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        position = self._position(state)
        steps, seconds = state.global_step - self._last[0], position["seconds"] - self._last[1]
        self._last = (state.global_step, position["seconds"])
        return {
            "kind": "train",
            **position,
            "ce": logs["ce"],
            **{key: logs.get(key) for key in _OBJECTIVE_KEYS},
            **{key: logs[key] for key in _FURTHER_KEYS if key in logs},
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "clipped": logs["clipped"],
            "tokens_per_s": steps * self.tokens_per_step / seconds,
        }

    def _write(self, record: dict[str, Any], state: TrainerState) -> None:
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                what = f"{key} of {record['kind']}"
                self.trainer.diverged(f"{what} became NaN or infinite at step {record['step']}")
        if not state.is_world_process_zero:
            return
        if self.trainer.metrics_file is not None:
            with storage_errors(self.trainer.folder.root):
                self.trainer.metrics_file.write(record)
        step, began = self._began
        pace = (time.perf_counter() - began) / (state.global_step - step)
        extra = {"steps": self.steps, "eta": pace * (self.steps - state.global_step), "mfu": None}
        if self.peak is not None and record["kind"] == "train":
            extra["mfu"] = record["tokens_per_s"] * self.flops_per_token / self.peak
        self.tell({**record, **extra})


@contextmanager
def interruptible(trainer: RunTrainer) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a lost terminal save at the next step boundary and stop; a second Ctrl-C
    stops at once.

    Not a second SIGTERM: schedulers send it to every process, and torchrun passes its own on. Nor,
    in one of several processes, a second SIGINT that comes with the first, for the same reason.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    first, echo = math.inf, _ECHO if world_size() > 1 else 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - first >= echo:
                raise KeyboardInterrupt(
                    "stopped at once; the same command continues from the last checkpoint"
                )
            first = min(first, now)
        trainer.interrupted = True

    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        heeded.append(signal.SIGHUP)
    before = {each: signal.signal(each, handle) for each in heeded}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
