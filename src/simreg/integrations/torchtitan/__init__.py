"""SimReg in torchtitan: a loss, the trainer that feeds it, and configs.

    torchrun --nproc-per-node 8 -m torchtitan.train \
        --module simreg.integrations.torchtitan --config llama3_debugmodel_simreg

or, in one's own config registry, `return with_simreg(my_config(), weight=0.3)`.
"""

from simreg.integrations.torchtitan.loss import ChunkedSimRegLoss
from simreg.integrations.torchtitan.trainer import SimRegTrainer, with_simreg

__all__ = ["ChunkedSimRegLoss", "SimRegTrainer", "with_simreg"]
