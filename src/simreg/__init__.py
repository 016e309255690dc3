"""SimReg: embedding similarity regularization for language-model pretraining."""

from simreg.capture import Attached, attach
from simreg.depths import AtDepths
from simreg.loss import SimRegLoss, explain, simreg_loss
from simreg.objectives import Objective, Reads
from simreg.schedule import Schedule

__all__ = [
    "AtDepths",
    "Attached",
    "Objective",
    "Reads",
    "Schedule",
    "SimRegLoss",
    "attach",
    "explain",
    "simreg_loss",
]
__version__ = "0.1.0.dev0"
