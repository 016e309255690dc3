"""The `simreg` command: parses, calls, and turns the user's mistakes into one line. No logic."""

import argparse
import atexit
import contextlib
import dataclasses
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import simreg
from simreg.recipe.errors import UserError, to_install

_TRAIN = """Train a language model, with SimReg or (--simreg.weight 0) without.

simreg train [CONFIG.yaml] [flags]: flags override the file, the file overrides the defaults shown.
The same command again continues a run that was stopped. `simreg train --list-models` prints the
presets. After a run, its folder (--out) holds config.yaml, metrics.jsonl, result.json, model/,
checkpoints/ and tensorboard/."""
_NEEDED = (
    *("accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "psutil", "pyarrow"),
    *("pydantic", "rich", "safetensors", "scipy", "tokenizers", "transformers", "tyro", "yaml"),
    "zstandard",
)
"""What the commands import of the extra `train`."""


def run() -> NoReturn:
    """`main` as a process of its own.

    One of several processes waits for its threads, runs the exit handlers and leaves out what
    Python does then: threads of gloo outlive their group and may abort while the interpreter is
    taken down (pytorch#179291), which makes a failure of a run that succeeded.
    """
    status = main()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # it may be closed
                stream.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for a user's mistake, 130 if stopped."""
    try:
        verb, rest = _verb(sys.argv[1:] if arguments is None else list(arguments))
        _call(verb, rest)
        with contextlib.suppress(AttributeError, ValueError):  # it may be closed
            sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"simreg: error: {error}\n")  # at once: other processes write too
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _NEEDED:
            raise
        advice = to_install("train")
        sys.stderr.write(f"simreg: error: {error.name} is not installed: {advice}\n")
        return 2
    except PermissionError as error:
        sys.stderr.write(f"simreg: error: {error.filename or 'a file'}: {error.strerror}\n")
        return 2
    except BrokenPipeError:  # `| head` has read enough
        from simreg.recipe.progress import silence

        silence()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        print(f"simreg: {error}" if str(error) else "simreg: interrupted", file=sys.stderr)
        return 130
    return 0


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(
        "simreg", description="Embedding similarity regularization for language-model pretraining."
    )
    parser.add_argument("--version", action="version", version=f"simreg {simreg.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (text, _, _) in _VERBS.items():
        verbs.add_parser(name, help=text, add_help=False)
    known = parser.parse_args(arguments[:1])  # the rest belongs to the verb
    return known.verb, arguments[1:]


def _call(verb: str, arguments: list[str]) -> None:
    """Import what the verb needs, and no more."""
    _, options, function = _VERBS[verb]
    if options is None or function is None:
        _train(arguments)
        return
    import tyro

    given = tyro.cli(_named(options), prog=f"simreg {verb}", args=arguments)
    _named(function)(given)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _train(arguments: list[str]) -> None:
    if "--list-models" in arguments:
        from simreg.recipe import models

        print(models.table())
        return
    import tyro

    from simreg.recipe import config

    in_file = bool(arguments) and not arguments[0].startswith("-")
    _check_place(arguments)
    default = config.load(arguments[0]) if in_file else config.RunConfig()
    if _value(arguments, "--auxiliary.name") not in (None, default.auxiliary.name):
        default = dataclasses.replace(default, auxiliary=config.AuxiliaryConfig())
    options = tyro.cli(
        config.RunConfig,
        prog="simreg train",
        description=_TRAIN,
        default=default,
        args=arguments[in_file:],
    )
    from simreg.recipe.processes import disband
    from simreg.recipe.train import train

    train(options)
    disband()


def _check_place(arguments: list[str]) -> None:
    """UserError for a config file that is not the first argument, nor the value of a flag."""
    for before, argument in pairwise(arguments):
        awaited = re.match(r"--[^=]+$", before)  # as the value of a flag
        if argument.endswith((".yaml", ".yml")) and "=" not in argument and not awaited:
            raise UserError(
                f"{argument}: there is one config file, and it comes before the flags, as in "
                "simreg train run.yaml --optim.lr 1e-3"
            )


def _value(arguments: list[str], flag: str) -> str | None:
    """What follows a flag, `--flag value` or `--flag=value`, if it is there."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else next(iter(arguments[i + 1 :]), None)
    return None


_VERBS = {  # help, options, what runs with them
    "train": ("train a language model, with SimReg or without", None, None),
    "compare": (
        "say how many tokens and how much time SimReg saves",
        "simreg.study.options:CompareOptions",
        "simreg.study.run:main",
    ),
    "eval": (
        "say what models can do without training on the task",
        "simreg.evaluation.options:EvalOptions",
        "simreg.study.zeroshot:main",
    ),
    "analyze": (
        "measure the geometry of trained models' embeddings",
        "simreg.analysis.options:AnalyzeOptions",
        "simreg.study.geometry:main",
    ),
    "bench": (
        "time the loss and measure its memory, beside its peers",
        "simreg.bench.run:BenchOptions",
        "simreg.bench.run:main",
    ),
    "plan": (
        "compute what the loss costs on a model and a cluster",
        "simreg.plan.run:PlanOptions",
        "simreg.plan.run:main",
    ),
}

if __name__ == "__main__":
    run()
