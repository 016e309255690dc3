"""The processes of one run, as torchrun or accelerate start them: who writes, what all know."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from simreg.recipe.errors import UserError

T = TypeVar("T")
_LAUNCH = (
    "start the run with torchrun or accelerate launch, which set all that is needed, or for a run "
    "of one process unset what another launcher has set (RANK, WORLD_SIZE, LOCAL_RANK; OMPI_..., "
    "PMI_..., MV2_... of MPI)"
)

_OFF = ("", "false", "0", "no", "n", "f", "off")


def world_size() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this is; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def is_main_process() -> bool:
    """True in the process that writes, the first of all nodes."""
    return rank() == 0


def check_met(told: tuple[int, int], found: tuple[int, int]) -> None:
    """UserError where accelerate found another rank and number of processes than we were told.

    It also reads the variables of MPI (Slurm may set some), and on an accelerator ignores a
    WORLD_SIZE without a LOCAL_RANK: the batch would be split for other processes than there are.
    """
    if found != told:
        raise UserError(
            f"RANK and WORLD_SIZE make this process {told[0]} of {told[1]}, but it has met the "
            f"others as {found[0]} of {found[1]}: {_LAUNCH}"
        )


def check_replicated() -> None:
    """UserError where `accelerate launch`, by a flag or its config file, is to shard the model."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() not in _OFF:
            raise UserError(
                f"accelerate was told to use {name.lower()}, but here each process holds the whole "
                "model: start the run with torchrun, or `accelerate launch --multi_gpu`; under "
                "DeepSpeed and FSDP simreg.integrations.transformers.SimRegTrainer runs"
            )


def check_place() -> None:
    """UserError where the environment tells of several processes and not where they meet."""
    if world_size() > 1 and not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"WORLD_SIZE makes this one of {world_size()} processes, but there is no MASTER_ADDR, "
            f"where they would meet: {_LAUNCH}"
        )


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, given to every process; only the main one calls it.

    The value is pickled. If `make` raises there, the launcher ends the others.
    """
    if not _several():
        return make()
    box = [make() if is_main_process() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def share(folder: Path) -> bool:
    """Whether this process sees what the main one writes in `folder`; all call it together."""
    if not _several():
        return True
    with ExitStack() as until_seen:

        def mark() -> str:  # a name that no machine can have in its cache, nor from a run before
            return until_seen.enter_context(tempfile.NamedTemporaryFile(dir=folder)).name

        seen = (folder / Path(from_main(mark)).name).exists()
        dist.barrier()
    return seen


def disband() -> None:
    """End the group of processes after a run that succeeded.

    An interpreter that exits with a live group may abort in gloo's threads (pytorch#179291). After
    an error the launcher ends the processes: here one could wait for another that is stuck.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_contact() -> Iterator[None]:
    """Turn what torch.distributed raises when another process is gone or stuck into a UserError."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own, but name its source file.
        if not _several() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise UserError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost contact with another "
            f"({reason}), whose own output says why; the same command continues from the last "
            "checkpoint, if there is one"
        ) from None


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def warn(message: str) -> None:
    """A line on standard error, from the main process only."""
    if is_main_process():
        print(f"simreg: warning: {message}", file=sys.stderr, flush=True)
