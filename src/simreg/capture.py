"""Finds the final embedding of a causal language model and hands it to an objective.

    reg = attach(model, SimRegLoss())
    out = model(input_ids, labels=labels)
    loss = out.loss + reg(labels)

The tap is a forward hook on the decoder, whose last hidden state is exactly what enters the LM
head, whatever the head does with it: fused, chunked or restricted heads included.
"""

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simreg.objectives import Objective

IGNORE_INDEX = -100


def attach(
    model: nn.Module, objective: Objective, *, module: nn.Module | None = None
) -> "Attached":
    """Hook `objective` to the final hidden states of `model`; nothing in the model changes.

    `model` is any causal LM of transformers, bare or wrapped (DDP, FSDP, `torch.compile`, PEFT), or
    any module with a `get_decoder()`. For other models, `module` names the submodule whose output
    is the input of the LM head (its final norm, say): a tensor `[B, L, d]`, a tuple that starts
    with it, or an output with a `last_hidden_state`. Attach before the first call of a compiled
    model, since a compiled graph does not see hooks that come later. Several handles on one model,
    even of one objective, are independent of each other.

    Raises:
        ValueError: no decoder can be found, or the model is an encoder-decoder (its labels are
            aligned with the decoder's positions, not shifted).
    """
    return Attached(_find_decoder(model) if module is None else module, objective)


def shift_left(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels `[B, L]` moved one to the left: position t gets token t + 1, the last one none."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


class Attached:
    """The handle that `attach` returns: call it after each forward pass; detach it when done.

    `metrics` holds the detached scalars of the last call. Also a context manager that detaches.
    Forward passes under `torch.no_grad()` pass it by.
    """

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self.objective = objective
        self.metrics: dict[str, Tensor] = {}
        self._hidden: Tensor | None = None
        self._attached = True
        self._hook = module.register_forward_hook(self._capture)

    def __call__(
        self,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        shift: bool = True,
    ) -> Tensor:
        """The weighted loss of the last forward pass, a scalar; consumes its hidden states.

        Args:
            labels: `[B, L]` int64, as transformers' models take them: the token at each position,
                or -100. They are shifted here.
            segments: `[B, L]` int, the document of each position; never shifted.
            num_items: the divisor of the summed loss; None: the valid labels of this call.
            shift: False if position t of `labels` already holds the token that follows it.

        Raises:
            RuntimeError: detached, or no forward pass since the last call.
            ValueError: `labels` or `segments` do not fit the hidden states.
        """
        hidden = self._take()
        _check("labels", labels, hidden)
        if segments is not None:
            _check("segments", segments, hidden)
        if shift:
            labels = shift_left(labels, getattr(self.objective, "ignore_index", IGNORE_INDEX))
        loss, metrics = self.objective(hidden, labels, segments, num_items=num_items)
        self.metrics = {name: value.detach() for name, value in metrics.items()}
        return loss

    def detach(self) -> None:
        """Remove the hook and let go of what it holds; twice is harmless."""
        self._hook.remove()
        self._attached = False
        self._hidden = None

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model (EMA, pickle) has the hook too: there it is detached and empty."""
        return {**vars(self), "_hidden": None, "_attached": False}

    def _capture(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Without gradients (evaluation, generation) there is nothing to train, nothing to keep.
        if self._attached and torch.is_grad_enabled():
            self._hidden = _last_hidden(output)

    def _take(self) -> Tensor:
        if not self._attached:
            raise RuntimeError("the objective was detached from the model: attach it again")
        if self._hidden is None:
            raise RuntimeError(
                "no hidden states to regularize: run a forward pass of the attached model, with "
                "gradients, before each call (a call consumes them; a compiled model must be "
                "attached before its first call)"
            )
        # Taken, not read: labels never meet the hidden states of another batch.
        hidden, self._hidden = self._hidden, None
        return hidden


def _find_decoder(model: nn.Module) -> nn.Module:
    inner = _unwrap(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a decoder-only language model, got {type(inner).__name__}, "
            "an encoder-decoder"
        )
    find = getattr(inner, "get_decoder", None)
    decoder = _unwrap(find()) if callable(find) else None
    if not isinstance(decoder, nn.Module):
        raise ValueError(
            f"model: found no get_decoder() on {type(inner).__name__}; pass module=, the submodule "
            "whose output enters the LM head (the final norm, say)"
        )
    return decoder


def _unwrap(model: Any) -> Any:
    """The module inside `torch.compile` (`_orig_mod`) and data-parallel wrappers (`module`)."""
    while True:
        children = getattr(model, "_modules", {})
        inner = children.get("_orig_mod") or children.get("module")
        if inner is None or hasattr(type(model), "get_decoder"):
            return model
        model = inner


def _last_hidden(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = (
            f"a tensor {list(hidden.shape)}"
            if isinstance(hidden, Tensor)
            else type(output).__name__
        )
        raise TypeError(
            "module: expected an output that is, starts with, or has as last_hidden_state, "
            f"hidden states [B, L, d]; got {got}"
        )
    return hidden


def _check(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.shape != hidden.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {list(hidden.shape[:2])}, as the hidden states of the last "
            f"forward pass, got {list(value.shape)}"
        )
    if value.device != hidden.device:
        raise ValueError(
            f"{name}: expected device {hidden.device}, as the hidden states, got {value.device}"
        )
