"""`simreg::loss`: one operator of torch over all kernels, with its shapes and its gradient.

`simreg::summed` takes its place on the CPU in training. `torch.compile` sees one node. Each kernel
is a module with

    forward(hidden, labels, segments, form) -> the results of `loss`
    backward(grad, hidden, labels, segments, saved, form) -> dL/dhidden

on tensors that `simreg.loss` has checked; `saved` are the last four results of `forward`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from simreg.kernels import blockwise, reference
from simreg.kernels.order import Form
from simreg.kernels.precision import whole_products

log = logging.getLogger("simreg")
_name = cache(torch.cuda.get_device_name)


def choose(hidden: Tensor, backend: str) -> tuple[str, str]:
    """The kernel that computes the loss of `hidden`, and why.

    Its shape decides nothing. At each that was measured, "blockwise" is faster than "reference" on
    a CPU (from 256 tokens up: benchmarks/results/loss-cpu.json) and "triton" than both on a GPU
    (from 1,024: loss-cuda.json), where "blockwise" remains for what Triton can't, by its memory.

    Raises:
        ValueError: if the named backend can't compute it here.
    """
    if backend in ("blockwise", "reference"):
        return backend, "asked for"
    if backend == "auto" and not hidden.is_cuda:
        return "blockwise", f"not triton: the device is {hidden.device.type}"
    obstacle = no_triton(hidden)
    if backend == "triton":
        if obstacle:
            raise ValueError(f"backend: 'triton' can't be used: {obstacle}")
        return backend, "asked for"
    if obstacle:
        return "blockwise", f"not triton: {obstacle}"
    return "triton", f"{hidden.dtype} on {_name(hidden.device)}"


def no_triton(hidden: Tensor) -> str | None:
    """Why the Triton kernels can't take `hidden`; None if they can."""
    if hidden.dtype == torch.float64:
        return "it has no float64"
    try:
        from simreg.kernels import triton
    except ImportError as error:
        return str(error)
    return triton.obstacle(hidden.device)


def _kernel(name: str) -> ModuleType:
    if name == "triton":
        from simreg.kernels import triton

        return triton
    return {"blockwise": blockwise, "reference": reference}[name]


@contextmanager
def plainly(hidden: Tensor) -> Iterator[None]:
    """Without autograd, autocast and reduced float32 products (TF32), on the device of `hidden`
    (where Triton would launch)."""
    plain = torch.autocast(hidden.device.type, enabled=False)
    device = torch.cuda.device_of(hidden)  # type: ignore[no-untyped-call]
    with torch.no_grad(), plain, device, whole_products:
        yield


@torch.library.custom_op("simreg::loss", mutates_args=())
def loss(
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    temperature: float,
    variant: str,
    push: float,
    push_above: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-token SimReg loss; tensors and the first three results as in `reference.reference`, the
    options (those of a `Form`) as in `simreg_loss`.

    The others are for the backward pass, ``[B, L]``: the sorting permutation (int64), and in its
    order, or where "blockwise" does not sort in that of the row, the norms of the hidden states
    ("triton": their inverses), the logsumexp of each token, and a statistic of its positives ("in":
    their logsumexp, "decoupled": their mean sigmoid).
    Differentiable once.
    """
    name, why = choose(hidden, backend)
    log.debug("backend %s (%s) for %s", name, why, list(hidden.shape))
    with plainly(hidden):
        form = Form(temperature, variant, push, push_above)
        results = _kernel(name).forward(hidden, labels, segments, form)
    return results  # type: ignore[no-any-return]


@loss.register_fake
def _shapes(hidden, labels, *options):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss, pos_cos, neg_cos, norm, lse, statistic = (
        hidden.new_empty(labels.shape, dtype=dtype) for _ in range(6)
    )
    return loss, pos_cos, neg_cos, labels.new_empty(labels.shape), norm, lse, statistic


@torch.library.custom_op("simreg::loss_backward", mutates_args=())
def loss_backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    index: Tensor,
    norm: Tensor,
    lse: Tensor,
    statistic: Tensor,
    temperature: float,
    variant: str,
    push: float,
    push_above: float,
    backend: str,
) -> Tensor:
    """dL/dhidden ``[B, L, d]`` in the dtype of hidden, from dL/dloss ``[B, L]``."""
    kernel = _kernel(choose(hidden, backend)[0])
    saved = (index, norm, lse, statistic)
    with plainly(hidden):
        form = Form(temperature, variant, push, push_above)
        gradient: Tensor = kernel.backward(grad, hidden, labels, segments, saved, form)
    return gradient


@loss_backward.register_fake
def _gradient_shape(grad, hidden, *rest):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, labels, segments, *ctx.options = inputs
    ctx.save_for_backward(hidden, labels, segments, *output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _through(backward: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of an operator by another, which has none."""

    def gradients(ctx, grad, *unused):  # type: ignore[no-untyped-def]
        others = (None,) * (2 + len(ctx.options))
        if grad is None:
            return (None, *others)
        return (backward(grad, *ctx.saved_tensors, *ctx.options), *others)

    def refuse(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError("simreg_loss: double backward is not supported")

    backward.register_autograd(refuse)
    return gradients


loss.register_autograd(_through(loss_backward), setup_context=_save)


def gradient_comes_early(hidden: Tensor, backend: str) -> bool:
    """Whether `summed` is for these: on the CPU, where its gradient is needed."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.float64)  # others would be rounded twice
        and backend in ("auto", "blockwise")
        and hidden.requires_grad
        and torch.is_grad_enabled()
    )


@torch.library.custom_op("simreg::summed", mutates_args=())
def summed(
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    temperature: float,
    variant: str,
    push: float,
    push_above: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `loss`, for losses that are summed: "blockwise", whose gradient is computed at once.

    The last is d(Σ loss)/dhidden, float32 or float64: what `backward` needs but for a factor if
    dL/dloss is the same of all tokens. If it is not, the result is the same, but takes longer.
    """
    log.debug("backend blockwise (%s) for %s", choose(hidden, backend)[1], list(hidden.shape))
    with plainly(hidden):
        form = Form(temperature, variant, push, push_above)
        results = blockwise.forward_and_gradient(hidden, labels, segments, form)
    return results  # type: ignore[return-value]


@summed.register_fake
def _(hidden, labels, *options):  # type: ignore[no-untyped-def]
    return (*_shapes(hidden, labels), hidden.new_empty(hidden.shape))


@torch.library.custom_op("simreg::summed_backward", mutates_args=())
def summed_backward(
    grad: Tensor,
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    index: Tensor,
    norm: Tensor,
    lse: Tensor,
    statistic: Tensor,
    gradient: Tensor,
    temperature: float,
    variant: str,
    push: float,
    push_above: float,
    backend: str,
) -> Tensor:
    """As `loss_backward`; `gradient` is the last result of `summed`."""
    with plainly(hidden):
        factors = grad[labels >= 0]
        if bool((factors == factors[:1]).all()):
            return gradient * factors[0] if len(factors) else torch.zeros_like(gradient)
        form = Form(temperature, variant, push, push_above)
        saved = (index, norm, lse, statistic)
        return blockwise.backward(grad, hidden, labels, segments, saved, form)


summed_backward.register_fake(_gradient_shape)
summed.register_autograd(_through(summed_backward), setup_context=_save)
