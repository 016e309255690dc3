"""Memory, as the sum of what tensors hold."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Bytes of the storages alive at once, of those made within."""

    def __init__(self, *before):
        """`before`: tensors that exist already, whose views are nothing new."""
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def freed():
            self.seen.discard(key)
            self.alive -= size

        weakref.finalize(storage, freed)
