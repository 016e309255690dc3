"""Closed formulas: FLOPs, memory and communication of the loss, and of the model beside it.

Everything is of one rank and one forward and backward pass over its rows ("a pass"); a step of k
accumulated passes costs k times as much on both sides. A rank is one that holds the LM head (under
pipeline parallelism: of the last stage, whose time is what the loss prolongs). FLOPs are those of
matrix products, two for each multiply-add, as `torch.utils.flop_counter` counts them.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from simreg.plan.models import Model

MIB = 2**20
SCRATCH = 64 * MIB
"""What `kernels.triton` may take beside the gradient and a second time the size of `hidden`."""
TILE, WIDE_TILE = 128, 2048
"""Tokens on a side of its tiles, and of those of `kernels.rectangular` on a GPU."""
REPEATED = 0.0137
"""Σ p² of labels with the frequencies of text (1 / rank, 32,000 words): pairs of one label."""
SYMMETRIC_TOKEN = 200
"""Bytes of statistics a token that `kernels.triton` sets aside."""
IN_FLIGHT = 16 * MIB
"""Embeddings that `parallel` sends at a time, or a tile of one row; four such parts at once."""
ROUND = 128 * MIB
"""Embeddings of the whole rows that a rank of `parallel` computes at a time, or one row."""
KEYS, NORMS, STATISTICS, RESULTS = 8, 4, 16, 20
"""Bytes a token that ranks tell each other: its label (and its segment, and its chunk); its norm;
what backward must know of it; what ranks that share the work found for it."""
FOUND, PULL = 12, 4
"""The same of whole rows: loss and cosines; what pulls at the loss."""
KNOWN = 300
"""Bytes that `parallel` needs, at most, for each token of the whole row: keys and statistics."""


@dataclass(frozen=True)
class Job:
    """A pass of a model on a cluster."""

    model: Model
    length: int
    """L, the tokens of a row."""
    rows: int = 1
    """Of each data-parallel rank, in a pass."""
    gpus: int = 1
    tp: int = 1
    """Ranks of tensor parallelism; after the final norm all of them hold the same tokens."""
    cp: int = 1
    """Ranks of context parallelism, each with consecutive L / cp tokens of a row."""
    pp: int = 1
    document: int | None = None
    """Tokens of a document, where rows are packed and nothing looks beyond a document."""
    itemsize: int = 2
    """Bytes of a hidden state's number, and of a weight as it travels."""
    within: int = 0
    """Layers within the model that have the loss too (`AtDepths`)."""

    @property
    def local(self) -> int:
        """Tokens of a row that a rank holds."""
        return self.length // self.cp

    @property
    def tokens(self) -> int:
        """Tokens that a rank holds."""
        return self.rows * self.local

    @property
    def hidden_bytes(self) -> int:
        """Bytes of their hidden states."""
        return self.tokens * self.model.hidden * self.itemsize

    @property
    def context(self) -> int:
        """Tokens that attention looks at: a row, or a document."""
        return min(self.length, self.document or self.length)


@dataclass(frozen=True)
class Setting:
    """How the loss is computed."""

    variant: str = "out"
    chunk: int | None = None
    """Tokens are compared within chunks of so many; None: in the whole row."""
    split: bool = True
    """The ranks of tensor parallelism share the work; False: each does all of it."""

    def span(self, job: Job) -> int:
        """s: how many tokens each token is compared with."""
        return min(job.context, self.chunk or job.context)

    def sharded(self, job: Job) -> bool:
        """Whether `parallel.sharded_simreg_loss` computes it, and not `simreg_loss`."""
        return job.cp > 1 or (job.tp > 1 and self.split)

    def at_home(self, job: Job) -> bool:
        """Whether chunks end with the shards, so that the ranks of CP have nothing to exchange."""
        return self.chunk is not None and job.local % self.chunk == 0

    def dealt(self, job: Job) -> Job | None:
        """What a rank computes, if `parallel` has a whole row for every rank."""
        if not self.sharded(job):
            return None
        if self.at_home(job):
            job = replace(job, length=job.local, cp=1, gpus=job.gpus // job.cp)
        workers = job.cp * self.sharers(job)
        if job.rows < workers:
            return None
        return replace(job, rows=-(-job.rows // workers), tp=1, cp=1)

    def turn(self, own: Job) -> Job:
        """As much of it as it computes at a time."""
        return replace(own, rows=max(1, min(own.rows, ROUND * own.rows // own.hidden_bytes)))

    def sharers(self, job: Job) -> int:
        """Ranks that do the work of the same tokens together."""
        return job.tp if self.split else 1


class Passes(NamedTuple):
    """FLOPs, or bytes, of the forward and of the backward pass."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.forward + self.backward


def symmetric_flops(
    tokens: int, span: int, hidden: int, *, tile: int = TILE, symmetric_backward: bool = True
) -> Passes:
    """Of `kernels.blockwise` and `kernels.triton`: only tiles on and above the diagonal of S.

    They hold s·(s + tile)/2 of the s² pairs of a span. Backward computes them again (all s², where
    Triton has no room for the M of a whole row), and multiplies M = D + Dᵀ with the embeddings.
    """
    product = 2 * tokens * span * hidden
    half = tokens * min(span + tile, 2 * span) * hidden
    return Passes(half, (half if symmetric_backward else product) + product)


def sharded_flops(tokens: int, span: int, hidden: int, *, sharers: int = 1) -> Passes:
    """Of `parallel`: own rows against the columns of all; S forward, S and M·E backward."""
    product = 2 * tokens * span * hidden / sharers
    return Passes(product, 2 * product)


def positive_share(span: int, tile: int = TILE) -> float:
    """Share of the tiles on and above the diagonal that hold positives, tokens sorted by label.

    Those on the diagonal (2 of the 2.6), those that a label's run crosses into, and those that the
    labels which make up much of a text fill alone.
    """
    return min(1.0, REPEATED + 2.6 * tile / (span + tile))


def sharded_positive_share(span: int, tile: int = WIDE_TILE) -> float:
    """The same of own rows and another rank's columns.

    A tile of rows has labels of one tile of columns, and of one more, at their ends.
    """
    part = min(1.0, tile / span)
    return min(1.0, REPEATED + 2 * part - part**2)


def symmetric_backward(job: Job, setting: Setting) -> bool:
    """Whether the M of a whole row fits into what Triton may take; see `kernels.triton`."""
    row = min(job.length, setting.chunk or job.length)  # documents do not make M smaller
    room = (SCRATCH / 2 + job.hidden_bytes) * 15 / 16 - SYMMETRIC_TOKEN * job.tokens
    return row**2 * job.itemsize <= room


def covered(job: Job, setting: Setting, tile: int) -> int:
    """How many tokens the tiles of a token cover, of which s count.

    Chunks fill tiles, or tiles chunks; documents begin anywhere, and cover two tiles more.
    """
    span, chunk = setting.span(job), min(job.length, setting.chunk or job.length)
    if span < chunk:
        return min(chunk, span + 2 * tile)
    return max(span, min(tile, job.local))


def loss_flops(job: Job, setting: Setting) -> Passes:
    """Of the loss, in all layers. "decoupled" goes over the tiles that hold positives again."""
    d = job.model.hidden
    own = setting.dealt(job)
    if setting.sharded(job) and own is None:
        span = covered(job, setting, WIDE_TILE)
        once = sharded_flops(job.tokens, span, d, sharers=setting.sharers(job))
        again = sharded_positive_share(min(span, job.local), WIDE_TILE)
    else:
        alone, turn, within = job, job, setting
        if own is not None:  # whose chunks are segments
            alone, turn, within = own, setting.turn(own), replace(setting, chunk=None)
        span, symmetric = covered(alone, setting, TILE), symmetric_backward(turn, within)
        once = symmetric_flops(alone.tokens, span, d, tile=TILE, symmetric_backward=symmetric)
        again = positive_share(span, TILE)
    if setting.variant == "decoupled":
        once = once._replace(forward=once.forward * (1 + again))
    layers = 1 + job.within
    return Passes(layers * once.forward, layers * once.backward)


def model_flops(job: Job) -> float:
    """6 a multiplied weight and token, and causal attention: half of 12·layers·d·context a token.

    The half is what a causal kernel computes; recomputed activations are not counted, so the
    loss's share comes out too large rather than too small.
    """
    model = job.model
    attention = 6 * model.layers * model.hidden * job.context
    return job.tokens * (6 * model.multiplied + attention) / (job.tp * job.pp)


def loss_memory(job: Job, setting: Setting) -> float:
    """Bytes at the peak of the loss, beyond what the model and `hidden` take; gradients too.

    Those of layers within wait for backward to come to their layer; so do their hidden states,
    which TP spreads along the row, gathered.
    """
    gradient = (1 + job.within * (1 if job.tp == 1 else 2)) * job.hidden_bytes
    if not setting.sharded(job):
        return gradient + job.hidden_bytes + SCRATCH  # of triton, at most
    if own := setting.dealt(job):
        return gradient + (3 + setting.sharers(job)) * setting.turn(own).hidden_bytes + SCRATCH
    d, t = job.model.hidden, WIDE_TILE
    accumulator = 4 * job.tokens / setting.sharers(job) * d
    part = min(job.hidden_bytes, max(IN_FLIGHT, t * d * job.itemsize))
    tiles = 4 * max(6 * t * t, 4 * t * d + t * t)
    return (
        gradient
        + accumulator
        + (4 if job.cp > 1 else 2) * part
        + tiles
        + KNOWN * job.rows * job.length
    )


def model_memory(job: Job) -> float:
    """The least that training takes: 16 bytes a parameter, and the input of each layer.

    Weights, gradients and two moments in float32, sharded over all ranks; full activation
    checkpointing, and sequence parallelism within TP.
    """
    states = 16 * job.model.parameters / job.gpus
    return states + job.model.layers * job.hidden_bytes / (job.tp * job.pp)


def arriving(job: Job, setting: Setting) -> float:
    """Hidden states (tokens of a row) that come from other ranks of CP in a pass over the columns.

    Parts travel whole. Of chunks, the mean of the ranks: those that chunks cut receive. Of
    documents only the first and the last are cut, in the middle on average.
    """
    chunk = min(setting.chunk or job.length, job.length)
    part = max(1, IN_FLIGHT // (WIDE_TILE * job.model.hidden * job.itemsize)) * WIDE_TILE
    shards = range(0, job.length, job.local)
    whole = sum(_beyond(job, start, chunk, part) for start in shards) / job.cp
    return whole if setting.span(job) == chunk else min(whole, job.context + part)


def _beyond(job: Job, start: int, chunk: int, part: int) -> int:
    """Tokens in parts of other shards that share a chunk with the shard from `start` on."""
    stop = start + job.local
    first, last = start // chunk * chunk, min(-(-stop // chunk) * chunk, job.length)

    def edge(position: int, round_up: bool) -> int:
        shard, inside = position // job.local * job.local, position % job.local
        return shard + min((-(-inside // part) if round_up else inside // part) * part, job.local)

    return start - edge(first, False) + edge(last, True) - stop


def loss_traffic(job: Job, setting: Setting) -> Passes:
    """Bytes that a rank receives for the loss, in all layers.

    Those within have to be gathered from where TP spreads them along the row.
    """
    once, gathered = _traffic(job, setting), (1 - 1 / job.tp) * job.hidden_bytes
    forward = (1 + job.within) * once.forward + job.within * gathered
    return Passes(forward, (1 + job.within) * once.backward)


def _traffic(job: Job, setting: Setting) -> Passes:
    if not setting.sharded(job):
        return Passes(0, 0)
    keys = KEYS * (1 + (job.document is not None) + (setting.chunk is not None))
    rest = 1 - 1 / setting.sharers(job)  # that the sharers of the work have to tell each other
    if own := setting.dealt(job):
        row = job.model.hidden * job.itemsize
        others = own.rows * (own.length - job.local)
        shared = (setting.sharers(job) - 1) * own.tokens
        forward = others * (keys + row + FOUND) + shared * FOUND
        return Passes(forward, others * (PULL + 2 * row) + shared * row)
    hidden = arriving(job, setting) * job.rows * job.model.hidden * job.itemsize
    visits = 2 if setting.variant == "decoupled" else 1
    others = 0 if setting.at_home(job) else (job.cp - 1) * job.tokens
    given = visits * hidden + (keys + NORMS) * others + RESULTS * job.tokens * rest
    return Passes(given, hidden + STATISTICS * others + job.hidden_bytes * rest)


class ModelTraffic(NamedTuple):
    """Bytes that a rank receives for the model, by the kind of parallelism that needs them."""

    data: float
    tensor: float
    context: float


def model_traffic(job: Job) -> ModelTraffic:
    """FSDP gathers the weights twice and scatters gradients: 3 × the bytes of its parameters.

    TP: two all-reduces a layer each way, or what sequence parallelism has in their place. CP: keys
    and values travel forward and backward, and their gradients. Experts' traffic is not counted,
    nor what recomputation repeats.
    """
    model, shards = job.model, job.gpus // (job.tp * job.pp)
    data = 3 * model.parameters * job.itemsize / (job.tp * job.pp) * (1 - 1 / shards)
    layers = model.layers / job.pp
    tensor = layers * 8 * (1 - 1 / job.tp) * job.hidden_bytes
    pairs = 2 * job.tokens * model.keys * job.itemsize / job.tp
    return ModelTraffic(data, tensor, 3 * layers * (job.cp - 1) * pairs)


PAIRS = 3.6
"""How many times as long products of shared pairs take as those of `simreg_loss`, on one H200 at
L = 8192 and d = 4096 in bfloat16: 5.4 times the time for 6sd FLOPs instead of 4sd
(benchmarks/results/loss-cuda.json); narrower or shorter rows take longer still."""


class Shares(NamedTuple):
    """What the loss adds, as a fraction of what the model takes."""

    flops: float
    memory: float
    received: float
    time: float
    """The loss's FLOPs at the rate given (`PAIRS` as long where ranks share pairs of rows) and its
    bytes over the link given, as a fraction of the time of the model's FLOPs at that rate: all
    traffic of the model is free. Only the embeddings of shared pairs travel meanwhile, so that
    without sharers over TP the larger of the two counts; else their sum."""


def shares(job: Job, setting: Setting, *, tflops: float, link: float) -> Shares:
    """Of a setting, on ranks that do `tflops` 10¹² FLOP/s and receive `link` 10⁹ bytes/s."""
    flops, whole = loss_flops(job, setting).total, model_flops(job)
    received, beside = loss_traffic(job, setting).total, sum(model_traffic(job))
    # Both as fractions of the model's time, so that no rate is too high.
    computing, waiting = flops / whole, received / whole * (tflops / link * 1e3)
    pairs = setting.sharded(job) and setting.dealt(job) is None
    if pairs:
        computing *= PAIRS
    meanwhile = pairs and setting.sharers(job) == 1
    return Shares(
        flops=flops / whole,
        memory=loss_memory(job, setting) / model_memory(job),
        received=received / beside if received else 0.0,
        time=max(computing, waiting) if meanwhile else computing + waiting,
    )
