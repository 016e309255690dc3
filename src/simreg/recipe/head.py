"""Llama and Mixtral whose LM head has a bias, which starts at the unigram distribution.

transformers has neither. Importing this module makes its Auto classes know them, so a trained one
loads where simreg is imported; elsewhere transformers says that it does not know the model type.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SAMPLE = 10_000_000
"""Tokens that are counted at most: enough for frequencies, and soon read."""
_BLOCK = 10_000


class LlamaHeadBiasConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """Of `LlamaHeadBias`."""

    model_type = "llama-head-bias"


class MixtralHeadBiasConfig(MixtralConfig):  # type: ignore[no-untyped-call]
    """Of `MixtralHeadBias`."""

    model_type = "mixtral-head-bias"


class LlamaHeadBias(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Llama with a bias of the LM head; all else as in Llama, and from the same random numbers."""

    config_class = LlamaHeadBiasConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        _add_bias(self)


class MixtralHeadBias(MixtralForCausalLM):  # type: ignore[no-untyped-call]
    """Mixtral with a bias of the LM head; all else as in Mixtral, and from the same random
    numbers."""

    config_class = MixtralHeadBiasConfig

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        _add_bias(self)


def _add_bias(model: Any) -> None:
    head = model.lm_head
    head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))


for _config, _model in (
    (LlamaHeadBiasConfig, LlamaHeadBias),
    (MixtralHeadBiasConfig, MixtralHeadBias),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)


def start_at_unigram(model: Any, tokens: "np.ndarray[Any, Any]") -> None:
    """Set the bias of a model of this module to the log frequencies of `tokens`.

    Each token of the vocabulary counts once more than it occurs. Source: Meister et al. 2023, "A
    Natural Bias for Language Generation Models", arXiv 2212.09686.
    """
    head = model.lm_head
    counts = 1 + _counted(tokens, head.out_features)
    with torch.no_grad():
        head.bias.copy_((counts / counts.sum()).log())


def _counted(tokens: "np.ndarray[Any, Any]", size: int) -> Tensor:
    """How often each id occurs, in blocks all over `tokens` if they are more than `SAMPLE`."""
    blocks = [tokens]
    if len(tokens) > SAMPLE:
        starts = np.linspace(0, len(tokens) - _BLOCK, SAMPLE // _BLOCK).astype(np.int64)
        blocks = [tokens[start : start + _BLOCK] for start in starts]
    counts = sum(np.bincount(block, minlength=size) for block in blocks)
    return torch.from_numpy(np.asarray(counts)).double()
