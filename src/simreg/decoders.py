"""Where in a model an objective is attached: its decoder, its layers, its LM head."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from simreg.objectives import Objective, check_layers, layer_at, reads

_OTHER_TASKS = re.compile(
    "For(MaskedLM|PreTraining|SequenceClassification|TokenClassification|QuestionAnswering|"
    "MultipleChoice|NextSentencePrediction)$"
)

# Their labels are the tokens to predict, position by position: what a shift would make wrong.
_NOT_SHIFTED = re.compile(
    "(Bart|BigBirdPegasus|Blenderbot|BlenderbotSmall|CpmAnt|MBart|Marian|Musicgen|MusicgenMelody|"
    "Mvp|PLBart|Pegasus|ProphetNet|TrOCR|Whisper)ForCausalLM|"
    "FlaubertWithLMHeadModel|XLNetLMHeadModel|XLMWithLMHeadModel"
)


def find_causal(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, if it makes logits."""
    inner: nn.Module = unwrap(model)
    if find_head(inner) is None:
        raise ValueError(
            f"model: found no get_output_embeddings() on {type(inner).__name__}, the LM head "
            "that the objective reads"
        )
    return inner


def find_layers(decoder: nn.Module) -> nn.ModuleList:
    """The longest list of modules that the decoder has."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"model: found no list of layers in {type(decoder).__name__}, whose earlier hidden "
            "states the objective reads; pass layers=, all of them in their order"
        )
    return max(lists, key=len)


def layers_read(objective: Objective, layers: Iterable[nn.Module] | None) -> list[nn.Module]:
    """The layer at each fraction of the depth, counted upwards: ⌈fraction · layers⌉."""
    stack = list(layers) if isinstance(layers, Iterable) else []
    if not stack or not all(isinstance(layer, nn.Module) for layer in stack):
        given = f"{type(layers).__name__} of {type(stack[0]).__name__}" if stack else repr(layers)
        raise ValueError(
            f"layers: {type(objective).__name__} reads hidden states within the model, so it needs "
            f"all its layers in their order, as in layers=model.blocks; got {given}"
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


def around(model: nn.Module, parts: set[nn.Module]) -> nn.Module:
    """The innermost module with these parts that is called (a list of modules is not): where a pass
    through them begins."""
    found, inner = model, [model]
    while inner:
        if type(inner[0]).forward is not nn.Module.forward:
            found = inner[0]
        inner = [child for child in inner[0].children() if parts <= {*child.modules()}]
    return found


def find_decoder(model: nn.Module) -> nn.Module:
    """What makes the hidden states that enter the LM head; ValueError if it cannot be found."""
    inner, of = unwrap(model), _transformer(model)
    kind = type(of).__name__
    if _OTHER_TASKS.search(kind):
        raise ValueError(
            f"model: expected a language model that predicts the next token, got {kind}; if it is "
            "one, pass module="
        )
    adapters = getattr(inner, "peft_config", None)
    if isinstance(adapters, dict) and any(
        getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()
    ):
        raise ValueError(
            "model: PEFT's prompt learning puts tokens of its own before the rows, which have no "
            "labels; train adapters (LoRA), or the model itself"
        )
    if _encodes(of):
        raise ValueError(
            f"model: expected a decoder-only language model, got {kind}, an encoder-decoder"
        )
    if aligns_labels(model):
        raise ValueError(
            f"model: {kind} takes labels that are aligned with its positions, where all else "
            "shifts them; pass module=, and shift=False with each call (SimRegTrainer does)"
        )
    if callable(getattr(inner, "get_decoder", None)):
        head = find_head(inner)
        for decoder in _decoders(inner, head, set()):
            if not _contains(decoder, head):
                return decoder
    raise ValueError(
        f"model: found no decoder in {type(inner).__name__} (by get_decoder()); pass module=, the "
        "submodule whose output enters the LM head (the final norm, say), and shift=False with "
        "each call (or to SimRegTrainer) if your labels are shifted already"
    )


def aligns_labels(model: nn.Module) -> bool:
    """Whether the labels of this model of transformers are of its positions, not shifted."""
    of = _transformer(model)
    kinds = [kind.__name__ for kind in type(of).__mro__]
    aligned = any(_NOT_SHIFTED.fullmatch(kind) for kind in kinds)
    return aligned or _encodes(of) or bool(_OTHER_TASKS.search(kinds[0]))


def _encodes(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _transformer(model: nn.Module) -> nn.Module:
    """The model of transformers inside its wrappers, of which PEFT's has a class of its own."""
    inner: nn.Module = unwrap(model, inside=True)
    find = getattr(inner, "get_base_model", None)
    return unwrap(find(), inside=True) if callable(find) else inner


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
        found = unwrap(found() if name == "get_decoder" and callable(found) else found)
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


def find_head(model: nn.Module | None) -> nn.Module | None:
    """The LM head, if the model says which it is."""
    find = getattr(model, "get_output_embeddings", None)
    head = None
    with suppress(NotImplementedError):
        head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def is_head(module: nn.Module, model: nn.Module) -> bool:
    """Whether it is the LM head: the model's own word, or else its width, that of the embedding's
    table of tokens."""
    known = find_head(model)
    if known is not None or not isinstance(module, nn.Linear):
        return module is known
    tokens = {table.num_embeddings for table in _tables(model)}
    return module.out_features in tokens and module.out_features != module.in_features


def logits_widths(model: nn.Module) -> set[int]:
    """Which widths are those of logits, not of hidden states, going by the tables of embeddings."""
    tables = _tables(model)
    return {table.num_embeddings for table in tables} - {table.embedding_dim for table in tables}


def _tables(model: nn.Module) -> list[nn.Embedding]:
    return [part for part in model.modules() if isinstance(part, nn.Embedding)]


def unwrap(model: Any, *, inside: bool = False) -> Any:
    """The module inside `torch.compile` (`_orig_mod`) and data-parallel wrappers (`module`).

    With `inside` also that within FSDP1 and torch's wrapper for checkpointing, to which all that
    the model has is passed on: there hooks belong on the wrapper, whose passes are not repeated.
    """
    names = ["_orig_mod", "module"]
    if inside:
        names += ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
    while not hasattr(type(model), "get_decoder"):
        children = getattr(model, "_modules", {})
        inner = next((children[name] for name in names if children.get(name) is not None), None)
        if inner is None:
            break
        model = inner
    return model
