"""The objectives by the names that configs use."""

import inspect
from collections.abc import Mapping
from typing import Any

from simreg.baselines.center import Center
from simreg.baselines.contraclm import ContraCLM
from simreg.baselines.cosine import Cosine
from simreg.baselines.deep_supervision import DeepSupervision
from simreg.baselines.dispersion import Dispersion
from simreg.baselines.label_smoothing import LabelSmoothing
from simreg.baselines.mtp import MTP
from simreg.baselines.nitp import NITP
from simreg.baselines.reweighting import Reweighting
from simreg.baselines.rival import Rival
from simreg.baselines.simctg import SimCTG
from simreg.baselines.simreg_variant import SimRegVariant
from simreg.baselines.z_loss import ZLoss

OBJECTIVES: dict[str, type[Rival]] = {
    "center": Center,
    "contraclm": ContraCLM,
    "cosine": Cosine,
    "deep-supervision": DeepSupervision,
    "dispersion": Dispersion,
    "label-smoothing": LabelSmoothing,
    "mtp": MTP,
    "nitp": NITP,
    "reweighting": Reweighting,
    "simctg": SimCTG,
    "simreg-variant": SimRegVariant,
    "z-loss": ZLoss,
}
_SIZES = ("hidden_size", "vocab_size")


def options(name: str) -> dict[str, Any]:
    """The options of an objective and their defaults, `weight` first; ValueError if unknown."""
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}")
    parameters = inspect.signature(OBJECTIVES[name]).parameters
    return {key: p.default for key, p in parameters.items() if key not in _SIZES}


def build(name: str, given: Mapping[str, Any], *, hidden_size: int, vocab_size: int) -> Rival:
    """The objective of a name with the `given` options, for a model of these sizes.

    Raises:
        ValueError: an unknown name or option, or a value that the objective refuses.
    """
    known = options(name)
    if unknown := given.keys() - known.keys():
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}"
        )
    sizes = {"hidden_size": hidden_size, "vocab_size": vocab_size}
    wanted = inspect.signature(OBJECTIVES[name]).parameters
    return OBJECTIVES[name](**given, **{key: sizes[key] for key in _SIZES if key in wanted})
