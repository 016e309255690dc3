"""Muon for the matrices inside the layers and AdamW for all else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from simreg.recipe.config import OptimConfig


class MuonAdamW(Optimizer):
    """The 2-D weights of a causal LM's layers by Muon, the rest by AdamW.

    Muon (Jordan et al. 2024) is torch's, its updates scaled to the RMS of AdamW's (Liu et al. 2025,
    arXiv 2502.16982), so that one learning rate and weight decay serve both. Embeddings, the LM
    head, norms, fused 3-D experts and what an objective owns are AdamW's; only matrices decay.

    Args:
        model: with a `get_decoder()` that holds the layers; an objective's weights may be a part
            of it.
        config: `lr`, `weight_decay`, `beta1`, `beta2`.
        extra: further parameters, for AdamW.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, extra: Iterable[nn.Parameter] = ()
    ) -> None:
        layers: Any = model.get_decoder().layers  # type: ignore[operator]
        matrices = [p for p in layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        rest = [p for p in (*model.parameters(), *extra) if id(p) not in inside]
        muon = Muon(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        adamw = AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._parts: tuple[Any, Any] = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state, which schedulers and checkpoints
        change and replace."""
        muon, adamw = self._parts
        muon.param_groups, adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        muon.state = adamw.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both; a closure is not supported."""
        if closure is not None:
            raise ValueError("closure: not supported")
        self._share()
        for part in self._parts:
            part.step()
