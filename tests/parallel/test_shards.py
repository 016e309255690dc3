"""What travels, when, and what a rank keeps: counted, not timed."""

import pytest
import torch
import torch.distributed as dist

from simreg.kernels import rectangular
from simreg.parallel import peers, sharded_simreg_loss, shards
from tests.parallel import worlds
from tests.peak import Peak

LENGTH, DIM = 64, 32  # of a shard: four tiles


class Wire:
    """Bytes that this rank receives, and in which order it sends, receives and computes tiles."""

    def __init__(self, patch):
        self.embeddings = self.rest = 0
        self.events = []
        begin, gather, tiles = dist.batch_isend_irecv, peers._all_gather, rectangular.tiles
        exchange = dist.all_to_all_single

        def counted_begin(operations):
            for operation in operations:
                if operation.op is dist.irecv:
                    self.embeddings += operation.tensor.nbytes
            self.events.append("send")
            return begin(operations)

        def counted_exchange(out, tensor, group):
            size = dist.get_world_size(group)
            self.embeddings += out.nbytes * (size - 1) // size
            return exchange(out, tensor, group=group)

        def counted_gather(out, tensor, group):
            self.rest += out.nbytes - tensor.nbytes
            return gather(out, tensor, group=group)

        def counted_tiles(rows, cols):
            self.events.append("compute")
            return tiles(rows, cols)

        patch.setattr(dist, "batch_isend_irecv", counted_begin)
        patch.setattr(dist, "all_to_all_single", counted_exchange)
        patch.setattr(peers, "_all_gather", counted_gather)
        patch.setattr(rectangular, "tiles", counted_tiles)


def _traffic(rank, ranks, variant):
    hidden = torch.randn(1, LENGTH, DIM, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(LENGTH)[None] % 7
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire(patch)
        loss = sharded_simreg_loss(hidden, labels, variant=variant, group=dist.group.WORLD)
        others = (ranks - 1) * LENGTH  # tokens
        passes = 2 if variant == "decoupled" else 1
        assert wire.embeddings == passes * others * DIM * 2
        header = (ranks - 1) * peers.HEADER_BYTES
        assert wire.rest == others * (8 + 4) + header  # labels, norms
        loss.backward()
        assert wire.embeddings == (passes + 1) * others * DIM * 2
        assert wire.rest == others * (8 + 4 + 16) + header  # and `Ends`

        # The next piece is on its way before the present one is computed with.
        first = wire.events[: wire.events.index("compute") + 2 * (ranks - 1)]
        assert first == ["send", "compute"] * (ranks - 1) + ["compute"] * (len(first) % 2)

    # Documents that end with a shard: nothing travels but what is gathered.
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire(patch)
        options = {"variant": variant, "group": dist.group.WORLD}
        ids = torch.full_like(labels, rank)
        sharded_simreg_loss(hidden, labels, segments=ids, **options).backward()
        assert wire.embeddings == 0
        sharded_simreg_loss(hidden, labels, chunk_size=LENGTH, **options).backward()
        assert wire.embeddings == 0
        # Half of a shard further they cross one border each.
        ids = (torch.arange(LENGTH)[None] + rank * LENGTH + LENGTH // 2) // LENGTH
        sharded_simreg_loss(hidden, labels, segments=ids, **options).backward()
        borders = (rank > 0) + (rank + 1 < ranks)
        assert wire.embeddings == (passes + 1) * borders * LENGTH // 2 * DIM * 2


@pytest.mark.parametrize(("ranks", "variant"), [(2, "decoupled"), (3, "out"), (4, "in")])
def test_bytes_on_the_wire_and_their_order(ranks, variant):
    worlds.run(_traffic, ranks, ranks, variant)


def _copies(rank, ranks):
    hidden = torch.randn(1, LENGTH, DIM, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(LENGTH)[None] % 7
    with pytest.MonkeyPatch.context() as patch:
        wire, pairs = Wire(patch), []
        similarities = rectangular.Plain._similarities

        def counted(plain, cols, pair):
            pairs.append((pair.row.stop - pair.row.start) * (pair.col.stop - pair.col.start))
            return similarities(plain, cols, pair)

        patch.setattr(rectangular.Plain, "_similarities", counted)
        sharded_simreg_loss(hidden, labels, replicas=dist.group.WORLD).backward()
        share = (ranks - 1) * LENGTH // ranks  # tokens that others computed
        header = (ranks - 1) * peers.HEADER_BYTES
        assert wire.embeddings == 0
        assert wire.rest == header + share * 5 * 4 + share * DIM * 2  # results; the gradient
        assert sum(pairs) == 2 * LENGTH**2 // ranks  # forward and backward
        pairs.clear()
        options = {"chunk_size": worlds.BLOCK, "replicas": dist.group.WORLD}
        sharded_simreg_loss(hidden, labels, **options).backward()
        assert sum(pairs) == 2 * LENGTH * worlds.BLOCK // ranks


def test_copies_share_the_pairs():
    worlds.run(_copies, 4, 4)


def _memory(rank, dtype, sizes, kind):
    block, length, dim = 64, 1024, 512
    shards.CHUNK, shards.block = 2 * block * dim * 2, lambda device: block
    hidden = torch.randn(1, length, dim).to(dtype).requires_grad_()
    labels = torch.arange(length)[None] * 7919 % 50
    with Peak(hidden, labels) as forward:
        loss = sharded_simreg_loss(hidden, labels, **{kind: dist.group.WORLD})
    with Peak(hidden, labels) as backward:
        loss.backward()
    tokens = 2 * length * 300  # keys and statistics, also of the other rank
    tile = 10 * block * max(block, dim) * 4  # similarities, embeddings, and what is made of them
    chunks = 4 * max(shards.CHUNK, block * dim * hidden.element_size())
    assert chunks / 4 < forward.peak <= tokens + tile + chunks
    assert backward.peak <= sizes * hidden.nbytes + tokens + tile + chunks
    assert backward.peak > sizes * hidden.nbytes * 0.9


# The gradient, and its accumulator in float32; of copies, of half of the tokens.
@pytest.mark.parametrize(
    ("dtype", "sizes", "kind"),
    [
        (torch.float32, 2, "group"),
        (torch.bfloat16, 3, "group"),
        (torch.float32, 1.5, "replicas"),
        (torch.bfloat16, 1.5, "replicas"),
    ],
)
def test_memory_is_that_of_the_gradient_and_its_accumulator(dtype, sizes, kind):
    worlds.run(_memory, 2, dtype, sizes, kind)
