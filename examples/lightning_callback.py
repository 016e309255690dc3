"""SimReg in Lightning: a callback, and nothing else changes; seconds on a CPU."""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from simreg import SimRegLoss
from simreg.integrations.lightning import SimRegCallback


class Model(LightningModule):
    """A small Llama on bytes; its step knows cross-entropy alone."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=256, num_attention_heads=4, use_cache=False, **sizes)
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of a batch."""
        loss: Tensor = self.model(batch["ids"], labels=batch["ids"]).loss
        self.log("ce", loss)
        return loss

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """AdamW; the learning rate warms up over a third of the steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        warmup = LinearLR(
            optimizer, 0.1, total_iters=int(self.trainer.estimated_stepping_batches) // 3
        )
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]


def main(steps: int = 20) -> dict[str, Tensor]:
    """Train on the source text of a module of Python; the last logged metrics."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    rows = [{"ids": row} for row in text[: len(text) // 128 * 128].view(-1, 128)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[SimRegCallback(SimRegLoss(weight=0.3), labels="ids")],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), DataLoader(rows, batch_size=8, shuffle=True))
    return dict(trainer.callback_metrics)


if __name__ == "__main__":
    print({name: round(value.item(), 3) for name, value in main().items()})
