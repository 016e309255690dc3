"""torchtitan's own configs with SimReg added: what `--module` and `--config` name."""

from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3
from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.models.qwen3 import config_registry as qwen3
from torchtitan.trainer import Trainer

from simreg.integrations.torchtitan.data import on_standard_library
from simreg.integrations.torchtitan.trainer import SimRegTrainer, with_simreg


def llama3_debugmodel_simreg() -> SimRegTrainer.Config:
    """Llama 3, 6 layers of width 256, on text that every machine has."""
    return _debug(llama3.llama3_debugmodel())


def deepseek_v3_debugmodel_simreg() -> SimRegTrainer.Config:
    """DeepSeek-V3 (mixture of experts), small, on text that every machine has."""
    return _debug(deepseek_v3.deepseek_v3_debugmodel())


def qwen3_moe_debug_simreg() -> SimRegTrainer.Config:
    """Qwen3 (mixture of experts), small, on text that every machine has."""
    return _debug(qwen3.qwen3_moe_debug())


def llama3_8b_simreg() -> SimRegTrainer.Config:
    """Llama 3 8B on C4; its tokenizer must lie in ./assets/hf/Llama-3.1-8B."""
    return _released(with_simreg(llama3.llama3_8b()))


def _debug(config: Trainer.Config) -> SimRegTrainer.Config:
    return _released(on_standard_library(with_simreg(config)))


def _released(config: SimRegTrainer.Config) -> SimRegTrainer.Config:
    """The backend that runs on several ranks with torch 2.13: torchtitan's default needs a newer
    one."""
    config.parallelism.spmd_backend = "partial_dtensor"
    return config
