"""Finds the final embedding of a causal language model and hands it to an objective.

    reg = attach(model, SimRegLoss())
    out = model(input_ids, labels=labels)
    loss = out.loss + reg(labels)

The tap is a forward hook on the decoder, whose last hidden state is what enters the LM head (but
for a scale, in a few models), whatever the head does with it: fused, chunked or restricted heads
included. Under autocast
to bfloat16 hidden states are handed on in it, as a head in its scope reads them. An objective that
reads more (`objectives.Reads`) gets a hook on the model itself, whose logits cross-entropy sees
(what the head returns may be scaled or capped after it), or on decoder layers too.
"""

import inspect
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simreg.decoders import (
    around,
    find_causal,
    find_decoder,
    find_head,
    find_layers,
    is_head,
    layers_read,
    logits_widths,
    unwrap,
)
from simreg.objectives import Objective, reads, switched_off

IGNORE_INDEX = -100


def attach(
    model: nn.Module,
    objective: Objective,
    *,
    module: nn.Module | None = None,
    layers: Iterable[nn.Module] | None = None,
) -> "Attached":
    """Hook `objective` to the final hidden states of `model`; nothing in the model changes.

    `model` is any causal LM of transformers that shifts its labels, bare or wrapped (DDP, FSDP,
    `torch.compile`, PEFT), or any module with a `get_decoder()`. For other models, `module` names
    the submodule whose output is the input of the LM head (its final norm, say): a tensor
    `[B, L, d]`, a tuple that starts with it, or an output with a `last_hidden_state`; and `layers`
    all its layers in their order, if the objective reads hidden states within it (`AtDepths`).
    Attach before the first call of a compiled model, since a compiled graph does not see hooks that
    come later; where another model of its class was compiled without, call
    `torch.compiler.reset()` first. Several handles on one model, even of one objective, are
    independent of each other. A head with layers of its own before the last one (BERT's) is taken
    as a whole: hidden states are what enters it.

    A forward pass raises TypeError where `module`, or a layer that is read, returns none of these,
    ValueError where `module` returns logits, and RuntimeError where a layer that is read (not if
    compiled), or `module` beside one, runs twice.

    Raises:
        ValueError: no decoder can be found, or the model is an encoder-decoder or a decoder of one
            (Bart's: its labels are aligned with its positions, not shifted) or no language model,
            or it has not what the objective reads besides (a `get_output_embeddings()`, a list of
            layers, one of its own for each depth of `AtDepths`, that runs once); or `objective`,
            `module` or one of `layers` is none, or not of the model.
    """
    _check_objective(objective)
    wanted = reads(objective)
    if layers is not None and not wanted.depths:
        raise ValueError(f"layers: {type(objective).__name__} reads none within the model")
    parts = {*model.modules()}
    if isinstance(layers, Iterable):
        layers = [*layers]
        if any(isinstance(layer, nn.Module) and layer not in parts for layer in layers):
            raise ValueError("layers: expected layers of the model, got one that is not in it")
    if module is None:
        decoder = find_decoder(model)
        if wanted.depths and layers is None:
            layers = find_layers(decoder)
        return Attached(
            decoder,
            objective,
            causal=find_causal(model) if wanted.logits or wanted.head else None,
            layers=layers_read(objective, layers) if wanted.depths else (),
        )
    if wanted.logits or wanted.head:
        raise ValueError(
            f"module: {type(objective).__name__} reads logits or the head, which are found only in "
            "a model with a get_decoder(); leave module out"
        )
    if not isinstance(module, nn.Module) or module not in parts:
        raise ValueError(f"module: expected a submodule of the model, got {module!r}")
    if getattr(module.forward, "__func__", None) is nn.Module.forward:  # a ModuleList, say
        raise ValueError(f"module: {type(module).__name__} is never called, name one that is")
    if isinstance(module, nn.Embedding):
        raise ValueError("module: this is an embedding, name what feeds the LM head")
    if is_head(module, unwrap(model)):
        raise ValueError("module: this is the LM head, name what feeds it (the final norm, say)")
    read = layers_read(objective, layers) if wanted.depths else []
    start = around(model, {module, *read}) if read else None
    widths = logits_widths(model)
    return Attached(module, objective, start=start, layers=read, no_hidden=widths)


def shift_left(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels `[B, L]` moved one to the left: position t gets token t + 1, the last one none."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


class Attached:
    """The handle that `attach` returns: call it after each forward pass; detach it when done.

    `metrics` holds the detached scalars of the last call. Also a context manager that detaches.
    Forward passes under `torch.no_grad()` pass it by, and all do while `listening` is False.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        *,
        start: nn.Module | None = None,
        causal: nn.Module | None = None,
        layers: Sequence[nn.Module] = (),
        no_hidden: Collection[int] = (),
    ) -> None:
        """The objective reads logits or the head of `causal`, and what `layers` (one a depth)
        return in a pass from the start of `start` (else of `module`) to the end of `module`, whose
        output is refused where it is as wide as one of `no_hidden`."""
        self.objective = objective
        self.metrics: dict[str, Tensor] = {}
        self.listening = True
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._earlier: dict[int, tuple[Tensor, int | None]] = {}  # with its version
        self._layers = len(layers)
        self._no_hidden = no_hidden
        # Weak: the model has the hooks that have this, and would wait for the garbage collector.
        self._causal = None if causal is None else weakref.ref(causal)
        self._running = False  # the decoder, in a forward pass with gradients
        self._passed_by = False  # the last pass, for it had none
        self._waits = False  # a pass, for a call
        self._unused = False  # a pass before the last one
        self._attached = True
        self._hooks = [
            (start or module).register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._capture),
        ]
        for i, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_hook(partial(self._capture_layer, i)))
        if causal is not None and reads(objective).logits:
            self._hooks.append(causal.register_forward_hook(self._capture_logits))

    def __call__(
        self,
        labels: Tensor,
        segments: Tensor | None = None,
        *,
        num_items: Tensor | float | None = None,
        shift: bool = True,
        **options: Any,
    ) -> Tensor:
        """The weighted loss of the last forward pass, a scalar; consumes its hidden states.

        Args:
            labels: `[B, L]` int64, as transformers' models take them: the token at each position,
                or -100. They are shifted here.
            segments: `[B, L]` int, the document of each position; never shifted.
            num_items: the divisor of the summed loss; None: the valid labels of this call.
            shift: False if position t of `labels` already holds the token that follows it.
            options: what else the objective takes (`positions` of a `ShardedSimRegLoss`).

        Raises:
            RuntimeError: detached, or no forward pass since the last call.
            ValueError: `labels` or `segments` do not fit the hidden states, which are kept then; or
                labels of rows that are spread over processes are to be shifted here.
        """
        if not hasattr(self.objective, "refuse"):
            hidden, read = self._arguments(labels, segments, shift)
        else:
            try:
                hidden, read = self._arguments(labels, segments, shift)
            except Exception:  # of any kind: other processes wait for this one
                known = [self._hidden, labels]
                devices = [value.device for value in known if isinstance(value, Tensor)]
                self.objective.refuse(*devices[:1])
                raise
        if shift:
            labels = shift_left(labels, getattr(self.objective, "ignore_index", IGNORE_INDEX))
        loss, metrics = self.objective(
            hidden, labels, segments, num_items=num_items, **read, **options
        )
        wanted = torch.is_grad_enabled() and not switched_off(self.objective)
        if wanted and not loss.requires_grad:
            warnings.warn(
                "the objective trains nothing: the hidden states it was attached to need no "
                "gradient (all of the model before its LM head is frozen)",
                stacklevel=2,
            )
        if self._unused:
            warnings.warn(
                "two forward passes with gradients before a call, which reads the last one: call "
                "after each; let go of one that is given up with forget(), or keep the objective "
                "out of it with listening = False",
                stacklevel=2,
            )
        self.forget()  # taken, not read: labels never meet the hidden states of another batch
        self.metrics = {name: value.detach() for name, value in metrics.items()}
        return loss

    def _arguments(
        self, labels: Tensor, segments: Tensor | None, shift: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """What waits for a call with these, as `_captured`."""
        hidden, read = self._captured()
        _check("labels", labels, hidden)
        if segments is not None:
            _check("segments", segments, hidden)
        if shift and getattr(self.objective, "group", None) is not None:
            raise ValueError(
                "shift: the tokens of a row are spread over processes, and each would lose the "
                "label of its last one: shift labels before they are spread, and say shift=False"
            )
        return hidden, read

    @property
    def device(self) -> torch.device | None:
        """Of the hidden states that wait for a call, if any do."""
        return None if self._hidden is None else self._hidden.device

    def forget(self) -> None:
        """Let go of what the last forward pass left, instead of a call: after it failed, say."""
        self._hidden = self._logits = None
        self._earlier = {}
        self._running = self._waits = False

    def detach(self) -> None:
        """Remove the hooks and let go of what they hold; twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._attached = False
        self.forget()

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
        empty: dict[str, Any] = {
            "objective": None,  # whose process groups can't be copied
            "_causal": None,
            "_hidden": None,
            "_logits": None,
            "_earlier": {},
            "_running": False,
            "_waits": False,
        }
        return {**vars(self), **empty, "_attached": False}

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        running = self._capturing()
        if self.listening:
            self._passed_by = not torch.is_grad_enabled()
        if running:  # what an abandoned step left would hold its graph through this one
            self._unused = self._waits
            self.forget()
        self._running = running

    def _capture_layer(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        # A layer that activation checkpointing runs again is not in a pass of the decoder's.
        if self._running and torch.is_grad_enabled():
            states = _as_the_head_reads(_last_hidden(output, "layers"))
            if torch.compiler.is_compiling():  # a graph does not say what changes them afterwards
                self._earlier[index] = states.clone(), None
            elif index in self._earlier:
                raise RuntimeError(
                    f"layers: {type(module).__name__} ran twice in one forward pass; which of its "
                    f"passes {type(self.objective).__name__} is to read cannot be told"
                )
            else:
                self._earlier[index] = states, states._version

    def _capture(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Without gradients (evaluation, generation) there is nothing to train, nothing to keep.
        if self._capturing():
            if self._waits:
                raise RuntimeError(
                    f"module: {type(module).__name__} ran twice in one forward pass, or once more "
                    "before a call; which of its passes the objective is to read cannot be told"
                )
            hidden = _last_hidden(output)
            if hidden.shape[-1] in self._no_hidden:
                raise ValueError(
                    f"module: {type(module).__name__} returns [B, L, {hidden.shape[-1]}], as wide "
                    "as the vocabulary: logits; name what feeds the LM head (the final norm, say)"
                )
            self._hidden = _as_the_head_reads(hidden)
            self._waits = True
        self._running = False

    def _capture_logits(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._capturing():
            self._logits = logits_of(output)

    def _capturing(self) -> bool:
        on = self._attached and self.listening and torch.is_grad_enabled()
        return on and not torch.compiler.is_exporting() and not _in_backward()

    def _captured(self) -> tuple[Tensor, dict[str, Any]]:
        """The final hidden states and what else the objective reads, by keyword."""
        if not self._attached:
            raise RuntimeError("the objective was detached from the model: attach it again")
        if _in_backward():
            raise RuntimeError(
                "called within activation checkpointing, which runs it again in the backward pass: "
                "call it after what is checkpointed"
            )
        passed_by = self._passed_by and not torch.is_grad_enabled()
        if self._hidden is None or passed_by:  # what waits is of an earlier pass
            raise RuntimeError(
                "no hidden states to regularize: run a forward pass of the attached model, with "
                "gradients, before each call (a call consumes them; a compiled model must be "
                "attached before its first call, and after torch.compiler.reset() if one of its "
                "class was compiled without an objective)"
            )
        return self._hidden, self._read(self._hidden)

    def _read(self, hidden: Tensor) -> dict[str, Any]:
        wanted = reads(self.objective)
        read: dict[str, Any] = {}
        if wanted.logits:
            if self._logits is None or self._logits.shape[:2] != hidden.shape[:2]:
                raise RuntimeError(
                    f"{type(self.objective).__name__} reads the logits of every position, which "
                    "the last forward pass did not make: turn off fused cross-entropy, leave "
                    "logits_to_keep alone, and call the attached model itself"
                )
            read["logits"] = self._logits
        if wanted.head:
            read["head"] = find_head(self._causal()) if self._causal else None
        if wanted.depths:
            if len(self._earlier) < self._layers:
                raise RuntimeError(
                    "no hidden states of earlier layers: reentrant activation checkpointing hides "
                    "them (use_reentrant=False does not), so does calling parts of the model "
                    "apart or in several threads, and so a graph compiled for an objective that "
                    "does not read them (torch.compiler.reset() first)"
                )
            read["earlier"] = tuple(_unchanged(*self._earlier[i]) for i in range(self._layers))
        return read


def _in_backward() -> bool:
    """Whether a backward pass runs forward again what activation checkpointing did not keep."""
    compiling = torch.compiler.is_compiling()  # whose graphs have no hooks to run again
    return not compiling and torch._C._current_graph_task_id() != -1


def _unchanged(states: Tensor, version: int | None) -> Tensor:
    if version is not None and states._version != version:
        raise RuntimeError(
            "hidden states of earlier layers were changed in place by what came after them: let a "
            "layer return a new tensor (x = x + f(x), not x += f(x))"
        )
    return states


def _check_objective(objective: object) -> None:
    """Refuse what is no `Objective`, before a forward pass is spent."""
    if isinstance(objective, type):
        raise ValueError(
            f"objective: expected an instance, got the class {objective.__name__}: add ()"
        )
    fits = callable(objective)
    if callable(objective):
        call = objective.forward if isinstance(objective, nn.Module) else objective
        with suppress(ValueError):  # of one that does not say
            parameters = inspect.signature(call).parameters.values()
            fits = any(p.name == "num_items" or p.kind is p.VAR_KEYWORD for p in parameters)
    if not fits:
        raise ValueError(
            "objective: expected something like SimRegLoss(), called with hidden states, labels, "
            f"segments and num_items, got {objective!r}"
        )


def _last_hidden(output: Any, whose: str = "module") -> Tensor:
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
            f"{whose}: expected an output that is, starts with, or has as last_hidden_state, "
            f"hidden states [B, L, d]; got {got}"
        )
    return hidden


def _as_the_head_reads(hidden: Tensor) -> Tensor:
    """float32 hidden states in bfloat16 under its autocast.

    The norm before the head returns float32 there (its weight is), whose products would take an
    objective many times as long. float16 lacks the exponents for gradients that nobody scaled.
    """
    device = hidden.device.type
    if hidden.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return hidden
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return hidden.to(dtype) if dtype == torch.bfloat16 else hidden


def logits_of(output: Any) -> Tensor | None:
    """Logits `[B, L, V]` of a model's output: an object, a mapping, a tuple with a loss before them
    or not, or a tensor; None if it has none."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, tuple):
        found = next((x for x in output if isinstance(x, Tensor) and x.dim() == 3), None)
    elif found is None:
        found = output
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


def _check(name: str, value: Tensor, hidden: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.shape != hidden.shape[:2]:
        turned = value.shape == hidden.shape[1::-1]
        raise ValueError(
            f"{name}: expected shape {list(hidden.shape[:2])}, as the hidden states of the last "
            f"forward pass, got {list(value.shape)}"
            + (": hidden states are [B, L, d], the batch first" if turned else "")
        )
    if value.device != hidden.device:
        raise ValueError(
            f"{name}: expected device {hidden.device}, as the hidden states, got {value.device}"
        )
