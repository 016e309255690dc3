"""Nothing K×K, T×T or T×V may exist, not even for a moment."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simreg.geometry import collapse
from simreg.geometry.classes import classes, token_cosines
from simreg.geometry.margins import margins
from simreg.geometry.sample import Sample
from simreg.geometry.spectrum import spectrum


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size()
                 for t in tree_leaves(result) if isinstance(t, torch.Tensor)]  # fmt: skip
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_the_largest_tensor_is_linear_in_the_vocabulary():
    tokens, d, size = 6000, 64, 3000
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(size).repeat(2)
    hidden, weight = torch.randn(tokens, d, generator=draw), torch.randn(size, d, generator=draw)
    sample = Sample.of(hidden, labels)
    with Largest() as largest:
        found = classes(sample, 2)
        token_cosines(sample)
        spectrum(sample)
        margins(sample, weight)
        collapse.nc1(found)
        collapse.cdnv(found, 5000)
        collapse.equiangular(found)
        collapse.etf_error(found)
        collapse.duality_error(found, weight)
        collapse.alignment(found, weight)
        collapse.nearest_other(found, found)
        collapse.agreement(sample, found, weight)
    assert len(found) == size
    assert largest.elements <= tokens * d  # the hidden states themselves; K×K is 23 times as much
