"""The shapes of the presets, as plain numbers, for what builds models and what plans for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What tells one preset from another; `experts` 0 is a dense Llama, otherwise a Mixtral."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int | None = None
    experts: int = 0
    rope_theta: float = 10_000.0
    context: int = 2048


EXPERTS_PER_TOKEN = 2
PRESETS = {
    "llama-tiny": Shape(128, 344, 4, 4),
    "llama-60m": Shape(512, 1376, 8, 8),
    "llama-130m": Shape(768, 2048, 12, 12),
    "llama-350m": Shape(1024, 2736, 24, 16),
    "llama-1b": Shape(2048, 5461, 24, 32),
    "llama-7b": Shape(4096, 11008, 32, 32),
    "mixtral-tiny": Shape(128, 344, 4, 4, experts=8),
    "mixtral-8x60m": Shape(512, 1376, 8, 8, experts=8),
    "mixtral-8x130m": Shape(768, 2048, 12, 12, experts=8),
    "mixtral-8x7b": Shape(4096, 14336, 32, 32, 8, experts=8, rope_theta=1e6, context=32_768),
}
PUBLISHED_VOCABULARY = 32_000  # of the LLaMA tokenizer: published sizes are counted with it
