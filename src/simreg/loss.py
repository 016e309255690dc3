"""The SimReg loss: the function, the module, and the checks on what they are given."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from simreg.kernels import op
from simreg.kernels.order import Form
from simreg.kernels.pairs import wide

Variant = Literal["out", "in", "decoupled"]
VARIANTS = get_args(Variant)
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30  # they, and sums of a few, are still float32
BACKENDS = ("auto", "triton", "blockwise", "reference")
REDUCTIONS = ("mean", "sum", "none")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT, TEMPERATURE, PUSH, PUSH_ABOVE = 0.3, 0.1, 3.333, 0.5
"""What `SimRegLoss`, the recipe and the integrations take unless told otherwise; docs/results.md,
"Which defaults, and why?", names the study behind each."""


def simreg_loss(
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float = TEMPERATURE,
    variant: str = "out",
    push: float = 0.0,
    push_above: float = PUSH_ABOVE,
    segments: Tensor | None = None,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Pull embeddings with the same next-token label together, push those of others apart.

    With :math:`s_{ij} = \cos(h_i, h_j) / τ`, candidates A(i) = the other tokens of the same segment
    whose label is not ignored, and positives P(i) = those of A(i) with the label of i:

    - ``"out"``: logsumexp_{A(i)} s_ij − mean_{P(i)} s_ip
    - ``"in"``: logsumexp_{A(i)} s_ij − logsumexp_{P(i)} s_ip + log |P(i)|
    - ``"decoupled"``: mean_{P(i)} log(1 + Σ_{A(i)∖P(i)} exp(s_in − s_ip))

    and 0 for a token without a positive. A reconstruction of the regularizer of arXiv 2605.08809;
    "out" and "in" are L_out and L_in of SupCon (Khosla et al., arXiv 2004.11362).

    With a `push`, every token that has candidates gets besides
    push · mean_{A(i)} max(0, cos(h_i, h_j) − push_above), whatever the labels: the margin loss of
    SimCTG (Su et al., arXiv 2202.06417, there with push_above 0.5).

    Args:
        hidden: ``[B, L, d]`` or ``[T, d]``: the input of the LM head. float32, bfloat16, float16
            or float64. Positions whose label is ignored are never read.
        labels: ``[B, L]`` or ``[T]`` int64, already shifted: the token that follows each position.
            ``ignore_index`` and negative labels are ignored. Kept for the backward pass, like
            ``hidden``: change neither in place before it.
        temperature: τ, from 1e-30 to 1e30.
        variant: ``"out"``, ``"in"`` or ``"decoupled"``.
        push: ≥ 0, weight of the push beside the loss of the variant.
        push_above: cosine above which pairs are pushed apart, from -1 to 1.
        segments: shape of ``labels``, integer: tokens interact only within equal ids of a row
            (documents packed into it). Equal ids need not be contiguous.
        chunk_size: tokens also interact only within chunks of so many positions of the row, 2 or
            more.
        ignore_index: the label that means "no label".
        reduction: ``"mean"`` divides the sum by the number of valid labels (as cross-entropy
            does, so tokens without a positive count as 0); ``"sum"``; ``"none"`` is per token.
        backend: ``"triton"`` (fused, for CUDA), ``"blockwise"`` (tiles in plain PyTorch, any
            device), ``"reference"`` (the whole L×L matrix, for tests), or ``"auto"``: triton where
            it runs, else blockwise. `simreg.explain` says which one a tensor gets.

    Returns:
        float32 (float64 for float64 input): a scalar, or the shape of ``labels`` for ``"none"``.
        NaN or infinity in gives NaN out (so may a norm above 1e19, whose square is beyond the range
        of float32); no valid label gives 0.

    Raises:
        ValueError: for arguments of a wrong shape, dtype, device or value, and for a backend that
            can't run here.
        RuntimeError: for double backward, forward-mode differentiation, and transforms of
            `torch.func`, none of which is supported.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    loss, _, _, valid = per_token(
        hidden,
        labels,
        segments,
        form=Form(temperature, variant, push, push_above),
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        backend=backend,
        summed=reduction != "none",
    )
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / valid.sum().clamp_min(1)


def explain(hidden: Tensor, *, backend: str = "auto") -> str:
    """Which backend computes the loss of `hidden`, and why: ``"blockwise: not triton: ..."``.

    The logger ``"simreg"`` says the same at level DEBUG whenever the loss is computed.

    Raises:
        ValueError: for what `simreg_loss` refuses, or a backend that can't run here.
    """
    _check_tensor("hidden", hidden)
    _check_hidden(hidden)
    _check_backend(backend)
    return ": ".join(op.choose(hidden, backend))


class SimRegLoss(nn.Module):
    """λ × SimReg and what it did, in the form that trainers take (`objectives.Objective`).

    Args:
        weight: λ ≥ 0. At 0 the loss is 0 without gradient (NaN where hidden states are not
            finite), and the metrics are still computed.
        temperature, variant, chunk_size, ignore_index, backend, push, push_above: as in
            `simreg_loss`, except that `push` is 3.333 by default. It is weighted by λ too.

    Raises:
        ValueError: for an option of no meaning.
    """

    def __init__(
        self,
        weight: float = WEIGHT,
        *,
        temperature: float = TEMPERATURE,
        variant: str = "out",
        chunk_size: int | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
        push: float = PUSH,
        push_above: float = PUSH_ABOVE,
    ) -> None:
        super().__init__()
        check_weight(weight)
        check_options(Form(temperature, variant, push, push_above), chunk_size, backend)
        check_ignore_index(ignore_index)
        self.weight = float(weight)
        self.temperature = temperature
        self.variant = variant
        self.chunk_size = chunk_size
        self.ignore_index = ignore_index
        self.backend = backend
        self.push = push
        self.push_above = push_above

    @property
    def form(self) -> Form:
        """Which loss this is, of one token."""
        return Form(self.temperature, self.variant, self.push, self.push_above)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss and its metrics.

        Args:
            hidden, labels, segments: as in `simreg_loss` (labels already shifted).
            num_items: the divisor of the summed loss; None: the valid labels of this call. Under
                gradient accumulation give the count of the whole batch; where gradients are
                averaged over ranks (DDP, FSDP), that of all ranks over the number of ranks.

        Returns:
            The scalar λ Σ_i ℓ_i / num_items, and detached scalars: ``loss`` (Σ_i ℓ_i over the valid
            labels of this call, without λ), ``pos_fraction`` (share of valid tokens with a
            positive), ``pos_cos`` (mean over tokens with a positive of the mean cosine to their
            positives), ``neg_fraction`` and ``neg_cos`` (the same for negatives).

        Raises:
            ValueError: for tensors as in `simreg_loss`, a `num_items` that is no divisor, or a
                `weight` set to what is no λ.
        """
        found = per_token(
            hidden.detach() if self.weight == 0 else hidden,
            labels,
            segments,
            form=self.form,
            chunk_size=self.chunk_size,
            ignore_index=self.ignore_index,
            backend=self.backend,
            summed=True,
        )
        return weigh(self.weight, Sums.of(*found), num_items)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        push = f", push={self.push}, push_above={self.push_above}" if self.push else ""
        ignored = f", ignore_index={self.ignore_index}" if self.ignore_index != -100 else ""
        backend = f", backend={self.backend!r}" if self.backend != "auto" else ""
        return (
            f"weight={self.weight}, temperature={self.temperature}, variant={self.variant!r}, "
            f"chunk_size={self.chunk_size}{push}{ignored}{backend}"
        )


class Sums(NamedTuple):
    """Sums over the labelled tokens of a call. Those of calls and ranks add up."""

    loss: Tensor
    tokens: Tensor
    positives: Tensor
    """How many tokens have a positive, and the sum of their mean cosines to theirs."""
    pos_cos: Tensor
    negatives: Tensor
    neg_cos: Tensor

    @classmethod
    def of(cls, loss: Tensor, pos_cos: Tensor, neg_cos: Tensor, valid: Tensor) -> "Sums":
        """Of the results of `per_token`."""
        pos, neg = ~pos_cos.isnan(), ~neg_cos.isnan()
        cosines = pos.sum(), pos_cos.nansum(), neg.sum(), neg_cos.nansum()
        return cls(loss.sum(), valid.sum(), *cosines)

    def means(self) -> dict[str, Tensor]:
        """The metrics of `SimRegLoss`."""
        tokens = self.tokens.clamp_min(1).to(self.loss.dtype)  # whole ones divide in the default
        return {
            "loss": self.loss.detach() / tokens,
            "pos_fraction": self.positives / tokens,
            "pos_cos": self.pos_cos / self.positives.clamp_min(1),
            "neg_fraction": self.negatives / tokens,
            "neg_cos": self.neg_cos / self.negatives.clamp_min(1),
        }


def weigh(
    weight: float, sums: Sums, num_items: Tensor | float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `SimRegLoss` returns.

    ValueError for a `weight` that is no finite number ≥ 0, or a `num_items` that is no divisor.
    """
    check_weight(weight)  # which trainers set
    return weight * per_item(sums.loss, sums.tokens.clamp_min(1), num_items), sums.means()


def per_item(total: Tensor, count: Tensor, num_items: Tensor | float | None) -> Tensor:
    """A summed loss over its divisor: `num_items`, or `count` where that is None.

    0 items are taken for one: then nothing is labelled, and the sum is 0.

    Raises:
        ValueError: for a `num_items` that is neither a number ≥ 0 nor a tensor with one.
    """
    check_items(num_items)
    if num_items is None:
        return total / count
    if isinstance(num_items, Tensor):
        items = num_items.reshape(())
        return total / items.masked_fill(items == 0, 1)
    return total / (float(num_items) or 1)


def check_items(num_items: Tensor | float | None) -> None:
    """Refuse a divisor that is none; a tensor's value is not read, which would wait for a GPU."""
    if isinstance(num_items, Tensor):
        good = num_items.numel() == 1 and _is_real(num_items)
    else:
        good = num_items is None or (is_number(num_items) and 0 <= num_items < math.inf)
    if not good:  # only then: a number that changes has no repr under torch.compile
        got = repr(num_items)
        if isinstance(num_items, Tensor):
            got = f"{list(num_items.shape)} in {num_items.dtype}"
        raise ValueError(
            f"num_items: expected a finite number ≥ 0, or a tensor with one, got {got}"
        )


def _is_real(value: Tensor) -> bool:
    return value.dtype != torch.bool and not value.is_complex()


def per_token(
    hidden: Tensor,
    labels: Tensor,
    segments: Tensor | None = None,
    *,
    form: Form,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    summed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked arguments to ``(loss, pos_cos, neg_cos, valid)``, each in the shape of ``labels``.

    The cosines are means over a token's positives and negatives, NaN where it has none. `summed`:
    whether the losses will be.
    """
    check_options(form, chunk_size, backend)
    check_ignore_index(ignore_index)
    check_tensors(hidden, labels, segments)
    check_transforms(hidden, labels, segments)
    valid, y = labels >= 0, labels
    if ignore_index >= 0:
        valid &= labels != ignore_index
        y = labels.masked_fill(~valid, -1)
    h, g = hidden, segments
    if hidden.ndim == 2:
        h, y, g = h[None], y[None], None if g is None else g[None]
    batch, length = y.shape
    if y.numel() == 0:
        nothing = h.sum(-1).to(wide(h.dtype)).view(labels.shape)
        return nothing, nothing.detach(), nothing.detach(), valid
    chunk = length if chunk_size is None else min(chunk_size, length)
    pad = -length % chunk
    if pad and g is None:  # chunks as documents: nothing is copied
        g = (torch.arange(length, device=y.device) // chunk).expand(batch, length)
    elif chunk < length:  # a chunk is a shorter row; the last one is filled with ignored tokens
        rows = batch * ((length + pad) // chunk)
        if pad:
            h, y = F.pad(h, (0, 0, 0, pad)), F.pad(y, (0, pad), value=-1)
            g = None if g is None else F.pad(g, (0, pad))
        h, y = h.reshape(rows, chunk, h.shape[-1]), y.reshape(rows, chunk)
        g = None if g is None else g.reshape(rows, chunk)
    options = float(form.temperature), form.variant, float(form.push), float(form.push_above)
    if summed and op.gradient_comes_early(h, backend):
        compute: Callable[..., tuple[Tensor, ...]] = op.summed
    else:
        compute = op.loss
    loss, pos_cos, neg_cos = compute(h, y, g, *options, backend)[:3]
    if loss.shape != labels.shape:
        loss, pos_cos, neg_cos = (
            r.reshape(batch, -1)[:, :length].reshape(labels.shape) for r in (loss, pos_cos, neg_cos)
        )
    return loss, pos_cos, neg_cos, valid


def check_options(form: Form, chunk_size: int | None, backend: str) -> None:
    """Refuse settings that mean nothing."""
    temperature, variant, push, push_above = form
    least, most = LEAST_TEMPERATURE, MOST_TEMPERATURE
    if not (is_number(temperature) and least <= temperature <= most):
        raise ValueError(
            f"temperature: expected a number from {least} to {most}, got {temperature!r}"
        )
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    if not (is_number(push) and 0 <= push < math.inf):
        raise ValueError(f"push: expected a finite number ≥ 0, got {push!r}")
    if not (is_number(push_above) and -1 <= push_above <= 1):
        raise ValueError(f"push_above: expected a number from -1 to 1, got {push_above!r}")
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 2):
        raise ValueError(
            "chunk_size: expected None or an int from 2 (a token alone is compared with nothing), "
            f"got {chunk_size!r}"
        )
    _check_backend(backend)


def is_number(value: object) -> bool:
    """Whether it is a real number, one of NumPy's included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_weight(weight: float) -> None:
    """Refuse a λ that is none."""
    if not (is_number(weight) and 0 <= weight < math.inf):
        hint = " (of a tensor, its item())" if isinstance(weight, torch.Tensor) else ""
        raise ValueError(f"weight: expected a finite number ≥ 0, got {weight!r}{hint}")


def check_ignore_index(ignore_index: int) -> None:
    """Refuse what no label can be."""
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index!r}")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


def check_tensors(hidden: Tensor, labels: Tensor, segments: Tensor | None) -> None:
    """Refuse shapes, dtypes and devices that do not go together."""
    for name, value in (("hidden", hidden), ("labels", labels), ("segments", segments)):
        if name != "segments" or value is not None:
            _check_tensor(name, value)
    _check_hidden(hidden)
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected {list(hidden.shape[:-1])} in torch.int64 to go with hidden, "
            f"got {list(labels.shape)} in {labels.dtype}"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected on {hidden.device} like hidden, got {labels.device}")
    if segments is None:
        return
    if segments.shape != labels.shape or segments.dtype not in INTEGERS:
        raise ValueError(
            f"segments: expected {list(labels.shape)} of a signed integer dtype, uint8 or bool, "
            f"got {list(segments.shape)} in {segments.dtype}"
        )
    if segments.device != hidden.device:
        raise ValueError(
            f"segments: expected on {hidden.device} like hidden, got {segments.device}"
        )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {value.layout}")
    if hasattr(value, "device_mesh"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor: use "
            "simreg.parallel.sharded_simreg_loss, or give its to_local() if that holds whole "
            "sequences"
        )


def _check_hidden(hidden: Tensor) -> None:
    if hidden.ndim not in (2, 3) or hidden.dtype not in FLOATS:
        raise ValueError(
            "hidden: expected [B, L, d] or [T, d] in float32, bfloat16, float16 or float64, "
            f"got {list(hidden.shape)} in {hidden.dtype}"
        )


def check_transforms(hidden: Tensor, labels: Tensor, segments: Tensor | None) -> None:
    """Refuse what the operator would answer wrongly (a tangent of 0), obscurely or one by one."""
    if forward_ad.unpack_dual(hidden).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("simreg_loss: forward-mode differentiation is not supported")
    if torch.compiler.is_compiling():  # which can't trace the next test, nor needs it
        return
    for tensor in (hidden, labels, segments):
        if tensor is not None and torch.func.debug_unwrap(tensor, recurse=False) is not tensor:
            raise RuntimeError("simreg_loss: not supported under transforms of torch.func")
