"""Presets of models trained from scratch, from transformers' own Llama and Mixtral classes."""

from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError
from simreg.recipe.head import LlamaHeadBiasConfig, MixtralHeadBiasConfig
from simreg.recipe.presets import EXPERTS_PER_TOKEN, PRESETS, PUBLISHED_VOCABULARY, Shape


def model_config(
    preset: str,
    *,
    vocab_size: int,
    seq_len: int,
    tie_embeddings: bool = False,
    eos_token_id: int | None = None,
    hidden_size: int | None = None,
    layers: int | None = None,
    head_bias: bool = False,
) -> PretrainedConfig:
    """The transformers config of a preset, perhaps of another width or depth, or with a `head` that
    has a bias.

    UserError if there is no such preset, or its heads do not fit the width.
    """
    if preset not in PRESETS:
        raise UserError(f"model.preset: no preset {preset!r}; there are {', '.join(PRESETS)}")
    shape = PRESETS[preset]
    if hidden_size is not None:
        shape = _widened(shape, hidden_size)
    if layers is not None:
        shape = replace(shape, layers=layers)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "max_position_embeddings": max(shape.context, seq_len),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": tie_embeddings,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }
    if not shape.experts:
        return (LlamaHeadBiasConfig if head_bias else LlamaConfig)(**common)
    return (MixtralHeadBiasConfig if head_bias else MixtralConfig)(
        **common,
        num_local_experts=shape.experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        output_router_logits=True,  # without them no load-balancing loss is added
        router_aux_loss_coef=0.02,  # as published for Mixtral 8x7B
    )


def _widened(shape: Shape, hidden: int) -> Shape:
    """The shape with heads of the same size, more or fewer of them, and all else in proportion."""
    head = shape.hidden // shape.heads
    heads, rest = divmod(hidden, head)
    kv_heads = None if shape.kv_heads is None else shape.kv_heads * hidden // shape.hidden
    if rest or (kv_heads is not None and (kv_heads == 0 or heads % kv_heads)):
        raise UserError(
            f"model.hidden_size={hidden}: expected a multiple of {head}, the width of a head"
            + ("" if kv_heads is None else ", that keeps the share of key-value heads")
        )
    intermediate = round(shape.intermediate * hidden / shape.hidden)
    return replace(shape, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads)


def of_run(
    config: RunConfig, *, vocab_size: int, eos_token_id: int | None = None
) -> PretrainedConfig:
    """The transformers config of a run's model; UserError if it can't be."""
    model = config.model
    return model_config(
        model.preset,
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        tie_embeddings=model.tie_embeddings,
        eos_token_id=eos_token_id,
        hidden_size=model.hidden_size,
        layers=model.layers,
        head_bias=model.head_bias is not None,
    )


def build(config: RunConfig, *, tokenizer_size: int, eos_token_id: int | None) -> PreTrainedModel:
    """A float32 model on the CPU whose weights follow from `config.model` and the seed alone."""
    vocab_size = config.model.vocab_size or tokenizer_size
    if tokenizer_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer_size} tokens but model.vocab_size is {vocab_size}: "
            f"raise it to {tokenizer_size} or more, leave it out, or use a smaller tokenizer"
        )
    hf_config = of_run(config, vocab_size=vocab_size, eos_token_id=eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = _model(hf_config)
    if (std := config.model.embedding_std) is not None:
        embedding: Any = model.get_input_embeddings()
        with torch.no_grad():  # scaled, not drawn again: the same directions at the same seed
            embedding.weight.mul_(std / hf_config.initializer_range)
    return model


def _model(config: PretrainedConfig) -> PreTrainedModel:
    make: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(config, dtype=torch.float32)
    return model


def count_parameters(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of the model of `config` (total, active for a token), without allocating them."""
    with torch.device("meta"):
        model = _model(config)
    total = sum(p.numel() for p in model.parameters())  # tied weights are listed once
    experts = getattr(config, "num_local_experts", 0)
    if not experts:
        return total, total
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts - config.num_experts_per_tok
    return total, total - in_experts * idle // experts


def flops_per_token(config: PretrainedConfig, active: int, seq_len: int) -> int:
    """Floating-point operations to train on a token, forward and backward.

    6 for each active weight that multiplies (an untied input embedding only looks up), and
    12·layers·d·L for attention over the full L·L matrix: the usual convention of MFU.
    """
    lookup: int = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention: int = 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return 6 * (active - lookup) + attention


def table() -> str:
    """The presets with their total and active parameters, as `--list-models` prints them."""
    lines = [f"{'preset':<16}{'total':>10}{'active':>10}"]
    for name in PRESETS:
        config = model_config(name, vocab_size=PUBLISHED_VOCABULARY, seq_len=2048)
        total, active = count_parameters(config)
        lines.append(f"{name:<16}{millions(total):>10}{millions(active):>10}")
    lines.append(f"parameters with a vocabulary of {PUBLISHED_VOCABULARY:,}; active: of a token")
    return "\n".join(lines)


def millions(count: int) -> str:
    """`58.07M`, `1339.08M`: the unit the literature uses for these sizes."""
    return f"{count / 1e6:.2f}M"
