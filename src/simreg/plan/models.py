"""The few numbers of a model that costs depend on."""

from dataclasses import dataclass

from simreg.recipe.errors import UserError
from simreg.recipe.presets import EXPERTS_PER_TOKEN, PRESETS, PUBLISHED_VOCABULARY, Shape


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer."""

    name: str
    hidden: int
    """d, the width of the hidden states that the loss compares."""
    layers: int
    parameters: int
    """All of them, embeddings and idle experts included."""
    multiplied: int
    """Weights that a token is multiplied with: no looked-up embeddings, no idle experts."""
    keys: int
    """Width of the keys of a layer, all heads; the values' is the same."""


_LLAMA3_VOCABULARY = 128_256
_PUBLISHED = {  # with their vocabularies
    "llama-8b": (Shape(4096, 14_336, 32, 32, 8), _LLAMA3_VOCABULARY),
    "llama-70b": (Shape(8192, 28_672, 80, 64, 8), _LLAMA3_VOCABULARY),
    "llama-405b": (Shape(16_384, 53_248, 126, 128, 8), _LLAMA3_VOCABULARY),
    "mixtral-8x22b": (Shape(6144, 16_384, 56, 48, 8, experts=8), PUBLISHED_VOCABULARY),
}
MODELS = {name: (shape, PUBLISHED_VOCABULARY) for name, shape in PRESETS.items()} | _PUBLISHED


def find(name: str) -> Model:
    """The model of that name; UserError if there is none."""
    if name not in MODELS:
        raise UserError(
            f"--model: no model {name!r}; there are {', '.join(MODELS)}; for another one give "
            "--params, --hidden and --layers"
        )
    return from_shape(name, *MODELS[name])


def from_shape(name: str, shape: Shape, vocabulary: int) -> Model:
    """A Llama or Mixtral with an untied LM head, as transformers builds it."""
    d = shape.hidden
    keys = d // shape.heads * (shape.kv_heads or shape.heads)
    attention = 2 * d * d + 2 * d * keys
    expert = 3 * d * shape.intermediate
    router, norms, embedding = d * shape.experts, 2 * d, vocabulary * d
    experts = max(1, shape.experts)
    layer = attention + experts * expert + router + norms
    parameters = shape.layers * layer + d + 2 * embedding
    idle = shape.layers * (experts - min(experts, EXPERTS_PER_TOKEN)) * expert
    return Model(name, d, shape.layers, parameters, parameters - idle - embedding, keys)
