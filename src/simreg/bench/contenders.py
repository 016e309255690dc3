"""What is compared: bare matrix products, peers, and every backend of the loss."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simreg import simreg_loss
from simreg.bench.problem import Shape, rows
from simreg.bench.recompute import at_once, chunked_recompute, pairs_at_a_time
from simreg.kernels.order import Form
from simreg.kernels.pairs import wide
from simreg.kernels.reference import reference
from simreg.loss import BACKENDS, TEMPERATURE
from simreg.parallel.loss import Found
from simreg.parallel.loss import per_token as sharded

BARE = "bare matmuls"
NAIVE, COMPILED, RECOMPUTE = "naive", "compiled naive", "chunked recompute"
ROUNDED = "compiled, rounded"
METRIC_LEARNING = "pytorch-metric-learning"
SHARDED = "sharded, one rank"
CAPTURED = "triton, captured"
SHARED = 2**31
"""Bytes of S up to which bare products of all rows are one batched product."""
MATRICES = {NAIVE: 7, COMPILED: 2, METRIC_LEARNING: 15, RECOMPUTE: 9}
"""Matrices of similarities in float32 alive at once, as measured on the CPU."""

Step = Callable[[], Tensor | None]
"""Forward and backward once; gives the loss, if it computes one, and leaves its gradient."""
Prepare = Callable[[Tensor, Tensor, Shape], Step]
"""Inputs (`problem.inputs`) and their shape to a step."""


@dataclass(frozen=True)
class Contender:
    """One line of the comparison."""

    name: str
    prepare: Prepare
    working: Callable[[Shape], int]
    """Predicted bytes that a step takes beyond the embeddings."""
    variant: str | None = None
    """Of the loss; None: it computes none."""
    missing: str | None = None
    """Why it cannot run on this machine."""
    compiled: bool = False
    """Whether its first step at a shape compiles, which takes memory of its own."""
    replayed: bool = False
    """Whether a step is replayed in memory that was set aside before: it has no peak of its own."""

    @property
    def title(self) -> str:
        """Name and, unless it is the default, variant."""
        return titled(self.name, self.variant)


def titled(name: str, variant: str | None) -> str:
    """Of a contender: its name and, unless it is the default, the variant."""
    return name if variant in (None, "out") else f"{name} ({variant})"


def contenders(device: torch.device, variants: Sequence[str] = ("out",)) -> list[Contender]:
    """Everything there is, bare products first; what cannot run says why in `missing`.

    Peers know the "out" loss alone, and are left out if it is not among the variants.
    """
    no_compiler = _no_compiler(device)
    peers = [
        Contender(COMPILED, _compiled(_naive_out), _compiled_bytes, "out", no_compiler, True),
        Contender(RECOMPUTE, _recompute, _recompute_bytes(device), "out"),
        Contender(METRIC_LEARNING, _metric_learning, _metric_bytes, "out", _no_metric_learning()),
    ]
    if device.type == "cuda":  # where it matters in which dtype products are
        rounded = _compiled(at_once)
        peers.insert(1, Contender(ROUNDED, rounded, _compiled_bytes, "out", no_compiler, True))
    ours = [
        Contender(
            backend, _backend(backend, variant), _linear_bytes, variant, _missing(backend, device)
        )
        for backend in BACKENDS
        if backend not in ("auto", "reference")
        for variant in variants
    ]
    missing = _missing("triton", device)
    ours += [
        Contender(CAPTURED, _captured(v), _linear_bytes, v, missing, replayed=True)
        for v in variants
    ]
    ours += [Contender(SHARDED, _sharded(v), _linear_bytes, v) for v in variants]
    naive = [Contender(NAIVE, _naive(variant), _naive_bytes, variant) for variant in variants]
    bare = Contender(BARE, _bare, _bare_bytes)
    return [bare, *naive, *(c for c in peers if c.variant in variants), *ours]


def _missing(backend: str, device: torch.device) -> str | None:
    return "runs on CUDA only" if backend == "triton" and device.type != "cuda" else None


def _step(hidden: Tensor, loss: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        hidden.grad = None
        value = loss()
        torch.autograd.backward(value)
        return value.detach()

    return step


def _bare(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
    """The 6·L²·d operations of the textbook loss: S, in backward S again and G·E."""
    e, _ = rows(hidden.detach(), labels, shape)
    parts = [e] if shape.rows * shape.row**2 * shape.itemsize <= SHARED else torch.split(e, 1)

    def step() -> None:
        for part in parts:
            torch.bmm(part, part.mT)
            s = torch.bmm(part, part.mT)
            torch.bmm(s, part)

    return step


def _backend(backend: str, variant: str) -> Prepare:
    def prepare(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
        def loss() -> Tensor:
            return simreg_loss(
                hidden, labels, variant=variant, chunk_size=shape.chunk, backend=backend
            )

        return _step(hidden, loss)

    return prepare


def _captured(variant: str) -> Prepare:
    """The kernels in a CUDA graph, as of a captured training step: no Python, one launch."""

    def prepare(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
        def once() -> tuple[Tensor, Tensor]:
            loss = simreg_loss(
                hidden, labels, variant=variant, chunk_size=shape.chunk, backend="triton"
            )
            # Not into hidden.grad: other contenders have accumulated there on another stream.
            (gradient,) = torch.autograd.grad(loss, hidden)
            return loss.detach(), gradient

        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            once()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, gradient = once()

        def step() -> Tensor:
            graph.replay()
            hidden.grad = gradient
            return loss

        return step

    return prepare


def _sharded(variant: str) -> Prepare:
    def prepare(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
        form = Form(TEMPERATURE, variant)

        def loss() -> Tensor:
            found: Found = sharded(
                hidden, labels, form=form, chunk_size=shape.chunk, whole_rows=False
            )
            return found.loss.sum() / found.labelled.clamp_min(1)

        return _step(hidden, loss)

    return prepare


def _textbook(hidden: Tensor, labels: Tensor, variant: str) -> Tensor:
    """The L×L definition under autograd, as one would first write it."""
    loss, _, _ = reference(hidden, labels, None, Form(TEMPERATURE, variant))
    return loss.sum() / (labels >= 0).sum().clamp_min(1)


def _naive(variant: str) -> Prepare:
    def prepare(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
        return _step(hidden, lambda: _textbook(*rows(hidden, labels, shape), variant))

    return prepare


def _naive_out(hidden: Tensor, labels: Tensor) -> Tensor:
    return _textbook(hidden, labels, "out")


def _compiled(loss: Callable[[Tensor, Tensor], Tensor]) -> Prepare:
    def prepare(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
        torch.compiler.reset()  # a shape each: else the second one would compile for any length
        compiled = torch.compile(loss, dynamic=False, fullgraph=True)
        return _step(hidden, lambda: compiled(*rows(hidden, labels, shape)))

    return prepare


def _recompute(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
    return _step(hidden, lambda: chunked_recompute(*rows(hidden, labels, shape)))


def _metric_learning(hidden: Tensor, labels: Tensor, shape: Shape) -> Step:
    """SupConLoss row by row, each with its own backward so that one row's matrices are kept.

    Its default reducer averages over the anchors whose loss is above 0; here they are summed and
    divided by the valid labels of the batch, as `simreg_loss` does.
    """
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import SumReducer

    supcon = SupConLoss(temperature=TEMPERATURE, reducer=SumReducer())
    count = (labels >= 0).sum().clamp_min(1)
    ignored = bool((labels < 0).any())

    def step() -> Tensor:
        hidden.grad = None
        total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        for embeddings, label in zip(*rows(hidden, labels, shape), strict=True):
            if ignored:
                embeddings, label = embeddings[label >= 0], label[label >= 0]
            loss = supcon(embeddings, label) / count
            loss.backward()
            total += loss.detach()
        return total

    return step


def _bare_bytes(shape: Shape) -> int:
    whole = shape.rows * shape.row**2 * shape.itemsize
    return shape.hidden_bytes + (whole if whole <= SHARED else whole // shape.rows)


def _naive_bytes(shape: Shape) -> int:
    return _linear_bytes(shape) + MATRICES[NAIVE] * shape.rows * _matrix_bytes(shape)


def _compiled_bytes(shape: Shape) -> int:
    return _linear_bytes(shape) + MATRICES[COMPILED] * shape.rows * _matrix_bytes(shape)


def _metric_bytes(shape: Shape) -> int:
    return _linear_bytes(shape) + MATRICES[METRIC_LEARNING] * _matrix_bytes(shape)


def _recompute_bytes(device: torch.device) -> Callable[[Shape], int]:
    def predicted(shape: Shape) -> int:
        pairs = min(pairs_at_a_time(device), shape.rows * shape.row**2)
        return _linear_bytes(shape) + MATRICES[RECOMPUTE] * 4 * pairs

    return predicted


def _matrix_bytes(shape: Shape) -> int:
    return shape.row**2 * _wide(shape)


def _linear_bytes(shape: Shape) -> int:
    """Embeddings and their gradient in float32, and the gradient in the dtype."""
    return shape.hidden_bytes + 2 * shape.hidden_bytes // shape.itemsize * _wide(shape)


def _wide(shape: Shape) -> int:
    return max(4, shape.itemsize)


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs triton"
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    found = device.type != "cpu" or any(name and shutil.which(name) for name in names)
    return None if found else "needs a C++ compiler"


def _no_metric_learning() -> str | None:
    if importlib.util.find_spec("pytorch_metric_learning"):
        return None
    return "not installed (pip install pytorch-metric-learning)"
