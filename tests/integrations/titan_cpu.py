"""What torchtitan's trainer lacks on a CPU with a released torch: shims, for tests only.

As a program, torchtitan's own entry point on the CPU:

    torchrun --nproc-per-node 2 -m tests.integrations.titan_cpu --module ... --config ...
"""

import json
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tests.processes import leave


def shim():
    """Let torchtitan take the CPU for its device. Before torchtitan is imported."""
    assert not any(name.split(".")[0] == "torchtitan" for name in sys.modules)
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, value in {
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=1 << 30),
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
    }.items():
        setattr(torch.cpu, name, value)
    if not hasattr(torch._C, "_cuda_setDevice"):
        torch._C._cuda_setDevice = lambda device: None
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = lambda timeout, group=None: None
    _attention()
    _sums()
    _pipeline()


def _attention():
    """FlexAttention has no backward pass on the CPU: the same by its mask and plain attention.

    Masks are of small blocks, so that short rows can be sharded, and not compiled, which takes
    longer than a whole run.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as sharded
    from torch.nn.attention import flex_attention

    flex_attention._DEFAULT_SPARSE_BLOCK_SIZE = 8
    sharded._compiled_create_block_mask = flex_attention.create_block_mask

    from torchtitan.models.common import attention

    def attend(q, k, v, *, block_mask, scale, enable_gqa, **unused):
        batch, heads, rows, columns = q.shape[0], 1, q.shape[2], k.shape[2]
        index = [torch.arange(size, device=q.device) for size in (batch, heads, rows, columns)]
        grid = [i.view([-1 if j == n else 1 for j in range(4)]) for n, i in enumerate(index)]
        mask = block_mask.mask_mod(*grid).expand(batch, heads, rows, columns)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        return out, None

    attention.FlexAttention._compiled_flex_attn = staticmethod(attend)
    attention._compiled_create_block_mask = attention.create_block_mask


def _sums():
    """FSDP scales gradients inside its reduction, which gloo can't: let it scale after it."""
    from torch.distributed.fsdp import FSDPModule
    from torchtitan import trainer

    build = trainer.Trainer.__init__

    def init(self, config):
        build(self, config)
        for part in self.model_parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)

    trainer.Trainer.__init__ = init


def _pipeline():
    """torchtitan 0.3 hands micro-batches to `step`, as torch after 2.13 takes them."""
    from torch.distributed.pipelining import schedules

    def step(self, *, arg_mbs, kwarg_mbs, target_mbs, losses, loss_kwargs=None, **unused):
        stages = [self._stage] if hasattr(self, "_stage") else self._stages
        for stage in stages:
            stage.has_backward = self._has_backward
            stage.clear_runtime_states()
        self._step_microbatches(
            arg_mbs, kwarg_mbs, target_mbs, losses, False, loss_kwargs=loss_kwargs
        )

    for schedule in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
        schedule.step = step


def run(rank, world, folder, jobs):
    """A worker of `tests.processes.spawn`: does (task of titan_jobs, job) for each name.

    What the last rank got goes to `folder`/{world}.json.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    shim()
    time.sleep = lambda seconds: None  # the trainer's, at the end of a run
    from tests.integrations import titan_jobs

    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does when it makes the group
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group-{world}", rank=rank, world_size=world
    )
    results = {}
    for name, (task, job) in jobs.items():
        results[name] = getattr(titan_jobs, task)(job, folder)
    if rank == world - 1:
        (folder / f"{world}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    shim()
    time.sleep = lambda seconds: None  # the trainer's, at the end of a run
    from torchtitan.train import main

    main()
