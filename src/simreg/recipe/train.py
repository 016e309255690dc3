"""`simreg train`: one run from its config to a trained model, resumable at any point."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from simreg.integrations.transformers import published
from simreg.objectives import Objective, by_rows
from simreg.recipe import assemble, checkpoints, models, progress, provenance
from simreg.recipe.config import RunConfig, to_dict
from simreg.recipe.data import Corpus, Ordered, Rows, prepare
from simreg.recipe.errors import UserError
from simreg.recipe.folder import RunFolder, flat, native_errors, storage_errors
from simreg.recipe.hub import quiet
from simreg.recipe.loop import RunCallback, RunTrainer, interruptible
from simreg.recipe.probe import Probe
from simreg.recipe.processes import (
    from_main,
    is_main_process,
    lost_contact,
    share,
    warn,
    world_size,
)
from simreg.recipe.tokenizer import as_trained

Tell = Callable[[dict[str, Any]], None]


def train(
    config: RunConfig, *, corpus: Corpus | None = None, on_step: Tell | None = None
) -> dict[str, Any]:
    """Run, resume or recall the training run of `config`; returns the content of `result.json`.

    Called in each of several processes (torchrun, accelerate), it shares every batch among them.

    Args:
        config: what to train and where (`config.out`). A folder that holds an unfinished run of
            the same config is continued, a finished one returns its recorded result at once.
        corpus: the prepared data of `config.data`, if the caller has it.
        on_step: receives each record of `metrics.jsonl` with "steps", "eta" (seconds) and "mfu"
            besides, in place of the lines on standard output.

    Raises:
        UserError: bad input or data, a folder of another run, a full disk, NaN.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint; its text says how to continue.
            With `on_step` also one that came when nothing was left but the last evaluation: the
            run is finished then, and the caller decides what else is to stop.
    """
    folder = RunFolder(config.out)
    with storage_errors(folder.root), quiet(), lost_contact(), assemble.governed(config):
        models.of_run(config, vocab_size=1)  # a model that can't be is no other run's config
        arguments = assemble.training_arguments(config, folder.checkpoints)  # here processes meet
        result = from_main(lambda: folder.finished(config))
        if result is None:
            with folder.claimed(config):
                result = from_main(lambda: folder.finished(config))  # by another, just now?
                if result is None:
                    corpus = corpus or prepare(config.data, progress=is_main_process())
                    return _run(config, folder, arguments, corpus, on_step)
        if on_step is None and is_main_process():
            print(f"{folder.root} holds the finished run of this config")
        return result


def _run(
    config: RunConfig,
    folder: RunFolder,
    arguments: TrainingArguments,
    corpus: Corpus,
    on_step: Tell | None,
) -> dict[str, Any]:
    say = print if on_step is None and is_main_process() else _silent
    corpus.require_batch(config.train.batch_rows)
    # Asked now: by the end of a long run the checkout may have moved on.
    origin = {
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "precision": assemble.precision(config),
        "processes": arguments.world_size,
    }
    checkpoint, manifest = _agreed(config, folder, corpus)
    if manifest.get("corpus", corpus.fingerprint) != corpus.fingerprint:
        raise UserError(
            f"the data of the run in {folder.root} has changed since it began, or the version that "
            "began it cut several files of text otherwise: "
            "restore it, choose another `out`, or delete the folder"
        )
    with _out_of_memory():
        model = assemble.model(config, corpus)
    total, active = models.count_parameters(model.config)
    rows = Ordered(corpus.train, config.train.seed, config.steps * config.train.batch_rows)
    say(_headline(config, corpus, total, active))
    objective = assemble.objective(config, model.config)
    clock = progress.Clock(manifest.get("seconds", 0.0))
    trainer = RunTrainer(
        config=config,
        folder=folder,
        clock=clock,
        corpus=corpus.fingerprint,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=_validation(config, corpus.validation),
        data_collator=assemble.collator(config),
        objective=objective,
        origins=_origins(manifest, origin),
    )
    flops = models.flops_per_token(model.config, active, config.data.seq_len)
    probe = None
    if config.train.analyze_every is not None:
        probe = Probe(corpus.validation, documents=config.simreg.scope == "document")
    tell = on_step or _print_line(config.steps, trainer)
    _add_callbacks(trainer, tell, flops, manifest.get("step", 0), probe)
    if checkpoint is not None:
        say(f"resuming after step {manifest['step']}")
        if split := _split_anew(
            config, manifest, arguments.world_size, objective, mixture=total > active
        ):
            warn(split)
        if (before := manifest.get("precision", origin["precision"])) != origin["precision"]:
            warn(f"train.precision was {before} so far and is {origin['precision']} from here on")
    with _metrics(trainer, manifest), interruptible(trainer), _out_of_memory():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def finish() -> dict[str, Any]:
        facts = _result(config, folder, corpus, rows.epochs, (total, active), clock.seconds)
        if config.simreg.weight:
            within = config.simreg.within(model.config.num_hidden_layers)  # a shallow model: fewer
            facts["objective"] |= {"depths": list(within), "depths_offset": list(within.values())}
        result = facts | origin
        if len(trainer.origins) > 1:
            result["earlier"] = trainer.origins[:-1]
        _export(folder, model, corpus, result)
        return result

    result = from_main(finish)
    say(f"done: validation ce {result['final_ce']:.4f}; model in {folder.model}")
    if trainer.interrupted and on_step is not None:
        raise KeyboardInterrupt(f"stopped after {folder.root}, which is finished")
    return result


def _agreed(
    config: RunConfig, folder: RunFolder, corpus: Corpus
) -> tuple[Path | None, dict[str, Any]]:
    """Where the main process resumes; UserError where another process does not see the same."""
    if not share(folder.root):
        raise UserError(
            f"{folder.root} is not the same folder on all machines: choose an `out` that they share"
        )
    mine = _common(config)
    checkpoint, manifest, theirs, wanted = from_main(
        lambda: (*folder.resume_point(), corpus.fingerprint, mine)
    )
    differing = [
        f"{name} is {mine[name]} here and {wanted[name]} in the first process"
        for name in mine
        if mine[name] != wanted[name]
    ]
    if differing:
        raise UserError(f"the processes must have one config: {'; '.join(differing)}")
    if theirs != corpus.fingerprint:
        raise UserError("data.source or data.tokenizer is not the same on all machines")
    return checkpoint, manifest


def _common(config: RunConfig) -> dict[str, Any]:
    """What processes must have in common; the corpus has a fingerprint, the folder a check."""
    own = {"out", "data.cache_dir", "data.source", "data.validation", "data.tokenizer"}
    own |= {"train.report_to", "train.precision"}  # the latter as each machine resolves it
    common = {name: x for name, x in flat(to_dict(config)).items() if name not in own}
    return common | {"the precision": assemble.precision(config)}


def _split_anew(
    config: RunConfig,
    manifest: dict[str, Any],
    processes: int,
    objective: Objective | None,
    *,
    mixture: bool,
) -> str:
    """What it means that batches are split otherwise than when the checkpoint was saved, if so."""
    names = {"processes": "the number of processes", "accumulate": "train.accumulate"}
    now = {"processes": processes, "accumulate": config.train.accumulate}
    before = {name: manifest.get(name, value) for name, value in now.items()}
    changes = [
        f"{names[name]} was {before[name]} and is {value}"
        for name, value in now.items()
        if before[name] != value
    ]
    if not changes:
        return ""
    meaning = "equal but for rounding"
    if not by_rows(objective):
        meaning = (
            f"the loss of {config.auxiliary.name} depends on how batches are split, so from here "
            "on it is another"
        )
    elif mixture and math.prod(now.values()) != math.prod(before.values()):
        meaning = "the router's loss depends on the micro-batch, so from here on it is another"
    return f"{', '.join(changes)}: {meaning}"


def _headline(config: RunConfig, corpus: Corpus, total: int, active: int) -> str:
    per_step = config.tokens_per_step
    processes = world_size()
    passes = config.steps * config.train.batch_rows / len(corpus.train)
    return (
        f"{assemble.described(config, total, active, processes)}\n"
        f"{config.steps} steps of {per_step:,} tokens = {config.steps * per_step:,} tokens, "
        f"from a corpus of {corpus.tokens:,}" + (f" ({passes:.3g} passes)" if passes > 1 else "")
    )


def _validation(config: RunConfig, rows: Rows) -> Any:
    if config.train.eval_tokens is None:
        return rows
    wanted = -(-config.train.eval_tokens // config.data.seq_len)
    return Subset(rows, range(min(wanted, len(rows))))


def _add_callbacks(
    trainer: RunTrainer, tell: Tell, flops: int, step: int, probe: Probe | None
) -> None:
    config = trainer.config
    peak = progress.peak_flops(trainer.args.device)
    callback = RunCallback(
        trainer,
        flops_per_token=flops,
        peak=None if peak is None else peak * trainer.args.world_size,
        tell=tell,
        probe=probe,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    if is_main_process():
        for each in assemble.reporter(config.train.report_to, trainer.folder.tensorboard, step):
            trainer.add_callback(each)


def _origins(manifest: dict[str, Any], origin: dict[str, Any]) -> list[dict[str, Any]]:
    """What the run was trained by, each from which step on; the present is the last."""
    before: list[dict[str, Any]] = manifest.get("origins", [])
    if before and before[-1] | {"from_step": 0} == origin | {"from_step": 0}:
        return before
    return [*before, {"from_step": manifest.get("step", 0), **origin}]


@contextlib.contextmanager
def _metrics(trainer: RunTrainer, manifest: dict[str, Any]) -> Iterator[None]:
    if not is_main_process():
        yield
        return
    trainer.metrics_file = progress.MetricsFile(
        trainer.folder.metrics, manifest.get("step", 0), manifest.get("lines", 0)
    )
    try:
        yield
    finally:
        trainer.metrics_file.close()


def _result(
    config: RunConfig,
    folder: RunFolder,
    corpus: Corpus,
    epochs: float,
    params: tuple[int, int],
    seconds: float,
) -> dict[str, Any]:
    evals = [r for r in progress.read_metrics(folder.metrics) if r["kind"] == "eval"]
    if not evals or evals[-1]["step"] != config.steps:
        raise UserError(
            f"{folder.metrics} lacks the evaluation after the last step: delete the newest of "
            f"{folder.checkpoints}; the same command goes on from the one before"
        )
    return {
        "schema": 1,
        "final_ce": evals[-1]["ce"],
        "tokens": evals[-1]["tokens"],
        "steps": config.steps,
        "seconds": seconds,
        "params": {"total": params[0], "active": params[1]},
        "objective": {"name": "simreg", **dataclasses.asdict(config.simreg)},
        "auxiliary": dataclasses.asdict(config.auxiliary),
        "corpus": {
            "fingerprint": corpus.fingerprint,
            "train_tokens": corpus.tokens,
            "epochs": epochs,
        },
    }


def _export(
    folder: RunFolder, model: PreTrainedModel, corpus: Corpus, result: dict[str, Any]
) -> None:
    """The model as a normal Hugging Face folder; then the result, which marks the run finished."""
    with native_errors(folder.model), checkpoints.new_folder(folder.model) as aside:
        # Off for training alone: whoever generates with the model wants it.
        model.config.use_cache = model.generation_config.use_cache = True
        with published(model):
            model.save_pretrained(aside)
        as_trained(corpus.tokenizer).save_pretrained(aside)
    checkpoints.write_atomically(folder.result, json.dumps(result, indent=2) + "\n")


def _print_line(total: int, trainer: RunTrainer) -> Tell:
    def tell(record: dict[str, Any]) -> None:
        try:
            print(progress.log_line(record, total=total), flush=True)
        except OSError:  # the reader of a pipe, or the terminal, is gone
            progress.silence()
            trainer.interrupted = True

    return tell


def _silent(text: str) -> None:
    """In place of `print`."""


_CPU = "DefaultCPUAllocator"


@contextlib.contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU it is a plain one
        if not isinstance(error, torch.OutOfMemoryError) and _CPU not in str(error):
            raise
        raise UserError(
            "the device is out of memory: raise train.accumulate, turn on "
            f"train.gradient_checkpointing or choose a smaller model ({str(error).splitlines()[0]})"
        ) from None
