"""How fast the optimizer steps of a run are, and how much time an objective costs."""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from simreg.capture import attach
from simreg.recipe import assemble
from simreg.recipe.config import RunConfig
from simreg.recipe.data import Corpus, Ordered
from simreg.recipe.muon import MuonAdamW

T = TypeVar("T")
WARM_UP = 2
LEAST_PAIRS = 8
"""Fewer pairs of steps say too little of how much a ratio of step times varies."""
WITHIN = 0.01
"""A ratio of step times is known well enough when its 95 % interval reaches no further."""


class Stepper:
    """The model, data and optimizer of a config, without anything around the steps.

    Of AdamW only the learning rate is the config's: no other setting changes what a step costs.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, steps: int) -> None:
        """Ready for up to `steps` steps."""
        self.device = assemble.device()
        self.config, self.bf16 = config, assemble.use_bf16(config.train.precision)
        model: Any = assemble.model(config, corpus)
        self.model = model.to(self.device)
        if config.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        objective = assemble.objective(config, self.model.config)
        if isinstance(objective, nn.Module):
            objective.to(self.device)
        self.reg = None if objective is None else attach(self.model, objective)
        self.forward = torch.compile(self.model) if config.train.compile else self.model
        owned = [*objective.parameters()] if isinstance(objective, nn.Module) else []
        self.parameters = [*self.model.parameters(), *owned]
        self.optimizer: torch.optim.Optimizer
        if config.optim.name == "muon":
            self.optimizer = MuonAdamW(self.model, config.optim, owned)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=config.optim.lr, fused=True)
        rows = Ordered(corpus.train, config.train.seed, steps * config.train.batch_rows)
        collate = assemble.collator(config)
        self._batches = iter(DataLoader(rows, assemble.micro_batch(config), collate_fn=collate))

    def step(self) -> float:
        """Load, forward, backward, clip and update once; returns the seconds it took."""
        began = time.perf_counter()
        for _ in range(self.config.train.accumulate):
            batch = {key: value.to(self.device) for key, value in next(self._batches).items()}
            segments = batch.pop("segments", None)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.forward(**batch).loss
            if self.reg is not None:  # outside, as in Trainer, which wraps the forward pass alone
                loss = loss + self.reg(batch["labels"], segments)
            (loss / self.config.train.accumulate).backward()
        if self.config.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began


def throughput(config: RunConfig, corpus: Corpus, steps: int = 10, seconds: float = 10.0) -> float:
    """Tokens a second of `config`'s training steps: median of up to `steps`, after a warm-up."""
    stepper = Stepper(config, corpus, WARM_UP + steps)
    with assemble.hook_guards(config):
        times = _measured(stepper.step, steps, seconds, least=3)
    return config.tokens_per_step / statistics.median(times)


def step_time_ratio(
    base: RunConfig, arm: RunConfig, corpus: Corpus, pairs: int = 20, seconds: float = 40.0
) -> dict[str, Any]:
    """Step time of `arm` over that of `base`, from interleaved steps A, B, B, A, A, B, ...

    Neighbouring steps share whatever else the machine does, so the ratio is taken pair by pair;
    each comes first in every other pair, so that what the first leaves behind favours neither.
    Takes `pairs`, and up to ten times as many while the 95 % interval of their median is wider
    than ± 1 %; stops after about `seconds`, but not before 8 pairs.

    Returns:
        {"ratio": median over the pairs, "ratio_quartiles": [first, third] over the pairs,
        "base_s", "arm_s": median seconds a step, "n": pairs, "threads": of the processor, "load":
        threads that wanted to run meanwhile, its own among them}
    """
    began, before = time.perf_counter(), os.getloadavg()[0]
    most = 10 * pairs
    first, second = (Stepper(config, corpus, WARM_UP + most) for config in (base, arm))
    swapped = itertools.cycle((False, True))

    def pair() -> tuple[float, float]:
        if next(swapped):
            arm_s = second.step()
            return first.step(), arm_s
        return first.step(), second.step()

    def known(times: list[tuple[float, float]]) -> bool:
        return len(times) >= pairs and _uncertainty(times) <= WITHIN

    with assemble.hook_guards(base, arm):
        times = _measured(pair, most, seconds, least=LEAST_PAIRS, enough=known)
    lower, median, upper = _quartiles(times)
    return {
        "ratio": median,
        "ratio_quartiles": [lower, upper],
        "base_s": statistics.median(a for a, _ in times),
        "arm_s": statistics.median(b for _, b in times),
        "n": len(times),
        "threads": torch.get_num_threads(),
        "load": load_during(time.perf_counter() - began, before, os.getloadavg()[0]),
    }


def load_during(seconds: float, before: float, after: float) -> float:
    """The mean load of some seconds, by the load averages of a minute before and after them.

    These decay by 1/e a minute: what ran before, such as an installation, is still in the second.
    """
    kept = math.exp(-seconds / 60)
    if kept > 0.8:  # too short to tell
        return after
    return max(0.0, (after - kept * before) / (1 - kept))


def _quartiles(times: list[tuple[float, float]]) -> list[float]:
    return statistics.quantiles([b / a for a, b in times], n=4, method="inclusive")


def _uncertainty(times: list[tuple[float, float]]) -> float:
    """Half the 95 % interval of the median ratio (McGill, Tukey and Larsen, 1978: box notches)."""
    lower, _, upper = _quartiles(times)
    return float(1.57 * (upper - lower) / len(times) ** 0.5)


def _measured(
    measure: Callable[[], T],
    count: int,
    seconds: float,
    *,
    least: int,
    enough: Callable[[list[T]], bool] = lambda results: False,
) -> list[T]:
    """Up to `count` results after the warm-up, fewer if `enough`, or (but `least`) out of time."""
    began = time.perf_counter()
    for _ in range(WARM_UP):
        measure()
    results: list[T] = []
    while len(results) < count and not (len(results) >= least and enough(results)):
        if len(results) >= least and time.perf_counter() - began >= seconds:
            break
        results.append(measure())
    return results
