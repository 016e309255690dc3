"""Llama and Mixtral whose LM head has a bias, which starts at the unigram distribution.

transformers has neither. Importing this module makes AutoModelForCausalLM know them, so that a
trained one loads; without it transformers says that it does not know the model type.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForCausalLM,
)

SAMPLE = 10_000_000
"""Tokens that are counted at most: enough for frequencies, and soon read."""
_BLOCK = 10_000


class LlamaHeadBiasConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """Of `LlamaHeadBiasForCausalLM`."""

    model_type = "llama-head-bias"


class MixtralHeadBiasConfig(MixtralConfig):  # type: ignore[no-untyped-call]
    """Of `MixtralHeadBiasForCausalLM`."""

    model_type = "mixtral-head-bias"


class LlamaHeadBiasForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Llama with a bias of the LM head; all else as in Llama, and from the same random numbers."""

    config_class = LlamaHeadBiasConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        _add_bias(self)


class MixtralHeadBiasForCausalLM(MixtralForCausalLM):  # type: ignore[no-untyped-call]
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
    (LlamaHeadBiasConfig, LlamaHeadBiasForCausalLM),
    (MixtralHeadBiasConfig, MixtralHeadBiasForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
    # By which Trainer's label smoothing knows what shifts its labels.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _model.__name__
# Experts are saved one by one, as in Mixtral.
register_checkpoint_conversion_mapping(
    MixtralHeadBiasConfig.model_type,
    get_checkpoint_conversion_mapping(MixtralConfig.model_type),  # type: ignore[no-untyped-call]
)


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
