"""Turns, limits, and what becomes of a step that fails."""

from types import SimpleNamespace

import pytest
import torch

from simreg.bench.measure import LEAST_ROUNDS, free_memory, time_in_turns, why

CPU = torch.device("cpu")


def run(steps, rounds=3, seconds=100.0):
    return time_in_turns(steps, CPU, rounds=rounds, seconds=seconds)


def noted(names, seen):
    return {name: (lambda name=name: seen.append(name)) for name in names}


def test_steps_take_turns_and_then_turn_round():
    seen = []
    times = run(noted("abc", seen), rounds=4)
    assert "".join(seen) == "abccbaabccbaabc"
    assert {name: len(taken) for name, taken in times.seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert not times.failed


def test_time_is_that_of_the_step_and_the_warm_up_does_not_count(monkeypatch):
    clock, calls = [0.0], []

    def step():
        calls.append(1)
        clock[0] += 100.0 if len(calls) == 1 else 2.0

    monkeypatch.setattr("simreg.bench.measure.time.perf_counter", lambda: clock[0])
    assert run({"a": step}, seconds=5.0).seconds == {"a": [2.0, 2.0, 2.0]}


@pytest.mark.parametrize(
    ("seconds", "rounds", "expected"), [(0.0, 9, LEAST_ROUNDS), (9.0, 9, 5), (1e9, 4, 4)]
)
def test_rounds_end_with_the_time(monkeypatch, seconds, rounds, expected):
    clock = [0.0]

    def step():
        clock[0] += 1.0

    monkeypatch.setattr("simreg.bench.measure.time.perf_counter", lambda: clock[0])
    times = run({"a": step, "b": step}, rounds=rounds, seconds=seconds)
    assert len(times.seconds["a"]) == expected


@pytest.mark.parametrize("at", [1, 3])
def test_a_step_that_fails_is_left_out_and_the_others_go_on(at):
    calls = []

    def fail():
        calls.append(1)
        if len(calls) == at:
            raise ValueError("no such\nthing")

    times = run({"a": lambda: None, "bad": fail, "c": lambda: None})
    assert times.failed == {"bad": "ValueError: no such"}
    assert {name: len(taken) for name, taken in times.seconds.items()} == {"a": 3, "c": 3}
    assert len(calls) == at


def raised(error):
    raise error


@pytest.mark.parametrize(
    "step",
    [
        lambda: torch.empty(2**50),  # what the allocator of the CPU really raises
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: raised(MemoryError()),
    ],
)
def test_out_of_memory_is_recorded_as_that(step):
    assert run({"big": step, "a": lambda: None}).failed == {"big": "out of memory"}


def test_reasons_are_one_short_line():
    assert why(RuntimeError("\n first\nsecond")) == "RuntimeError: first"
    assert why(KeyError()) == "KeyError: "
    assert len(why(RuntimeError("x" * 999))) == 200


def test_free_memory_of_the_cpu_is_in_bytes():
    assert 2**26 < free_memory(CPU) < 2**46


def test_what_programs_use_is_not_free(monkeypatch):
    memory = SimpleNamespace(available=5, total=9)
    monkeypatch.setattr("simreg.bench.measure.psutil.virtual_memory", lambda: memory)
    assert free_memory(CPU) == 5
