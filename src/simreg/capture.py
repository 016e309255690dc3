"""Finds the final embedding of a causal language model and hands it to an objective.

    reg = attach(model, SimRegLoss())
    out = model(input_ids, labels=labels)
    loss = out.loss + reg(labels)

The tap is a forward hook on the decoder, whose last hidden state is exactly what enters the LM
head, whatever the head does with it: fused, chunked or restricted heads included. Under autocast
to bfloat16 hidden states are handed on in it, as a head in its scope reads them. An objective that
reads more (`objectives.Reads`) gets a hook on the model itself, whose logits cross-entropy sees
(what the head returns may be scaled or capped after it), or on decoder layers too.
"""

import inspect
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simreg.objectives import Objective, check_layers, layer_at, reads

IGNORE_INDEX = -100
_OTHER_TASKS = re.compile(
    "For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|"
    "NextSentencePrediction)$"
)

# Their labels are the tokens to predict, position by position: what a shift would make wrong.
_NOT_SHIFTED = re.compile(
    "(Bart|BigBirdPegasus|Blenderbot|BlenderbotSmall|CpmAnt|MBart|Marian|Musicgen|MusicgenMelody|"
    "Mvp|PLBart|Pegasus|ProphetNet|TrOCR|Whisper)ForCausalLM|XLNetLMHeadModel|XLMWithLMHeadModel"
)


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

    A forward pass raises TypeError where `module`, or a layer that is read, returns none of these.

    Raises:
        ValueError: no decoder can be found, or the model is an encoder-decoder or a decoder of one
            (Bart's: its labels are aligned with its positions, not shifted) or no language model,
            or it has not what the objective reads besides (a `get_output_embeddings()`, a list of
            layers, one of its own for each depth of `AtDepths`, that runs once); or `objective`,
            `module` or one of `layers` is none.
    """
    _check_objective(objective)
    wanted = reads(objective)
    if layers is not None and not wanted.depths:
        raise ValueError(f"layers: {type(objective).__name__} reads none within the model")
    if module is None:
        decoder = _find_decoder(model)
        if wanted.depths and layers is None:
            layers = _find_layers(decoder)
        return Attached(
            decoder,
            objective,
            causal=_find_causal(model) if wanted.logits or wanted.head else None,
            layers=_at_depths(objective, layers) if wanted.depths else (),
        )
    if wanted.logits or wanted.head:
        raise ValueError(
            f"module: {type(objective).__name__} reads logits or the head, which are found only in "
            "a model with a get_decoder(); leave module out"
        )
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected a submodule of the model, got {module!r}")
    if module is _head(_unwrap(model)):
        raise ValueError("module: this is the LM head, name what feeds it (the final norm, say)")
    if not wanted.depths:
        return Attached(module, objective)
    read = _at_depths(objective, layers)
    return Attached(module, objective, start=_around(model, {module, *read}), layers=read)


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
    ) -> None:
        """The objective reads logits or the head of `causal`, and what `layers` (one a depth)
        return in a pass from the start of `start` (else of `module`) to the end of `module`."""
        self.objective = objective
        self.metrics: dict[str, Tensor] = {}
        self.listening = True
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._earlier: dict[int, Tensor] = {}
        self._layers = len(layers)
        # Weak: the model has the hooks that have this, and would wait for the garbage collector.
        self._causal = None if causal is None else weakref.ref(causal)
        self._running = False  # the decoder, in a forward pass with gradients
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
        hidden, read = self._captured()
        _check("labels", labels, hidden)
        if segments is not None:
            _check("segments", segments, hidden)
        if shift:
            if getattr(self.objective, "group", None) is not None:
                raise ValueError(
                    "shift: the tokens of a row are spread over processes, and each would lose the "
                    "label of its last one: shift labels before they are spread, and say "
                    "shift=False"
                )
            labels = shift_left(labels, getattr(self.objective, "ignore_index", IGNORE_INDEX))
        loss, metrics = self.objective(
            hidden, labels, segments, num_items=num_items, **read, **options
        )
        wanted = torch.is_grad_enabled() and getattr(self.objective, "weight", 1) != 0
        if wanted and not loss.requires_grad:
            warnings.warn(
                "the objective trains nothing: the hidden states it was attached to need no "
                "gradient (all of the model before its LM head is frozen)",
                stacklevel=2,
            )
        self.forget()  # taken, not read: labels never meet the hidden states of another batch
        self.metrics = {name: value.detach() for name, value in metrics.items()}
        return loss

    @property
    def device(self) -> torch.device | None:
        """Of the hidden states that wait for a call, if any do."""
        return None if self._hidden is None else self._hidden.device

    def forget(self) -> None:
        """Let go of what the last forward pass left, instead of a call: after it failed, say."""
        self._hidden = self._logits = None
        self._earlier = {}

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
        }
        return {**vars(self), **empty, "_attached": False}

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._running = self._capturing()
        if self._running:  # what an abandoned step left would hold its graph through this one
            self.forget()

    def _capture_layer(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        # Activation checkpointing runs layers again in the backward pass: the decoder does not
        # run then, and what they return is not of a forward pass.
        if self._running and torch.is_grad_enabled():
            self._earlier[index] = _as_the_head_reads(_last_hidden(output, "layers"))

    def _capture(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Without gradients (evaluation, generation) there is nothing to train, nothing to keep.
        if self._capturing():
            self._hidden = _as_the_head_reads(_last_hidden(output))
        self._running = False

    def _capture_logits(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._capturing():
            self._logits = _logits(output)

    def _capturing(self) -> bool:
        return self._attached and self.listening and torch.is_grad_enabled()

    def _captured(self) -> tuple[Tensor, dict[str, Any]]:
        """The final hidden states and what else the objective reads, by keyword."""
        if not self._attached:
            raise RuntimeError("the objective was detached from the model: attach it again")
        if self._hidden is None:
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
            read["head"] = _head(self._causal()) if self._causal else None
        if wanted.depths:
            if len(self._earlier) < self._layers:
                raise RuntimeError(
                    "no hidden states of earlier layers: reentrant activation checkpointing hides "
                    "them (use_reentrant=False does not), and so does calling parts of the model "
                    "apart"
                )
            read["earlier"] = tuple(self._earlier[i] for i in range(self._layers))
        return read


def _find_causal(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, if it makes logits."""
    inner: nn.Module = _unwrap(model)
    if _head(inner) is None:
        raise ValueError(
            f"model: found no get_output_embeddings() on {type(inner).__name__}, the LM head "
            "that the objective reads"
        )
    return inner


def _find_layers(decoder: nn.Module) -> nn.ModuleList:
    """The longest list of modules that the decoder has."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"model: found no list of layers in {type(decoder).__name__}, whose earlier hidden "
            "states the objective reads"
        )
    return max(lists, key=len)


def _at_depths(objective: Objective, layers: Iterable[nn.Module] | None) -> list[nn.Module]:
    """The layer at each fraction of the depth, counted upwards: ⌈fraction · layers⌉."""
    stack = list(layers or ())
    if not stack or not all(isinstance(layer, nn.Module) for layer in stack):
        raise ValueError(
            f"layers: expected all layers of the model in their order, within which "
            f"{type(objective).__name__} reads hidden states, got {type(layers).__name__} of "
            f"{type(stack[0]).__name__ if stack else 'nothing'}"
        )
    depths = reads(objective).depths
    for depth in depths:
        if not 0 < depth <= 1:
            raise ValueError(f"depth: expected a fraction of the layers in (0, 1], got {depth!r}")
    check_layers(objective, len(stack))
    chosen = [stack[layer_at(depth, len(stack)) - 1] for depth in depths]
    if any(stack.count(layer) > 1 for layer in chosen):
        raise ValueError(
            "layers: one module stands at several depths of the model; which of its passes "
            f"{type(objective).__name__} is to read cannot be told"
        )
    return chosen


def _around(model: nn.Module, parts: set[nn.Module]) -> nn.Module:
    """The innermost module with these parts that is called (a list of modules is not): where a pass
    through them begins."""
    found, inner = model, [model]
    while inner:
        if type(inner[0]).forward is not nn.Module.forward:
            found = inner[0]
        inner = [child for child in inner[0].children() if parts <= {*child.modules()}]
    return found


def _find_decoder(model: nn.Module) -> nn.Module:
    inner = _unwrap(model)
    if _OTHER_TASKS.search(type(inner).__name__):
        raise ValueError(
            f"model: expected a language model that predicts the next token, got "
            f"{type(inner).__name__}; if it is one, pass module="
        )
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a decoder-only language model, got {type(inner).__name__}, "
            "an encoder-decoder"
        )
    if any(_NOT_SHIFTED.fullmatch(kind.__name__) for kind in type(inner).__mro__):
        raise ValueError(
            f"model: {type(inner).__name__} takes labels that are aligned with its positions, "
            "where all else shifts them; pass module=, and shift=False with each call"
        )
    if callable(getattr(inner, "get_decoder", None)):
        head = _head(inner)
        for decoder in _decoders(inner, head, set()):
            if not _contains(decoder, head):
                return decoder
    raise ValueError(
        f"model: found no decoder in {type(inner).__name__} (by get_decoder()); pass module=, the "
        "submodule whose output enters the LM head (the final norm, say), and shift=False with "
        "each call if your labels are shifted already"
    )


def _decoders(model: Any, head: nn.Module | None, seen: set[int]) -> Iterator[nn.Module]:
    """What may be the decoder, likeliest first.

    transformers guesses by names, and for some models finds the head, or a model with it.
    """
    if id(model) in seen:
        return
    seen.add(id(model))
    inside = []
    for name in ("get_decoder", "base_model", "model"):
        found = getattr(model, name, None)
        found = _unwrap(found() if name == "get_decoder" and callable(found) else found)
        if isinstance(found, nn.Module):
            yield found
            inside.append(found)
    for found in inside:
        if _contains(found, head):
            yield from _decoders(found, head, seen)


def _contains(decoder: nn.Module, head: nn.Module | None) -> bool:
    """Whether the decoder is, or has, the LM head; one that is the input embedding may be in it."""
    if head is None or isinstance(head, nn.Embedding):
        return False
    return any(part is head for part in decoder.modules())


def _head(model: nn.Module | None) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = None
    with suppress(NotImplementedError):
        head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


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


def _unwrap(model: Any) -> Any:
    """The module inside `torch.compile` (`_orig_mod`) and data-parallel wrappers (`module`)."""
    while True:
        children = getattr(model, "_modules", {})
        inner = children.get("_orig_mod") or children.get("module")
        if inner is None or hasattr(type(model), "get_decoder"):
            return model
        model = inner


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


def _logits(output: Any) -> Tensor | None:
    """Those of a model's output: an object, a tuple with a loss before them or not, or a tensor."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = next((x for x in output if isinstance(x, Tensor) and x.dim() == 3), None)
    elif found is None:
        found = output
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


def _check(name: str, value: Tensor, hidden: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.shape != hidden.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {list(hidden.shape[:2])}, as the hidden states of the last "
            f"forward pass, got {list(value.shape)}"
        )
    if value.device != hidden.device:
        raise ValueError(
            f"{name}: expected device {hidden.device}, as the hidden states, got {value.device}"
        )
