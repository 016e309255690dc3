"""SimReg in a plain PyTorch loop with a model of one's own; seconds on a CPU, torch alone."""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simreg import SimRegLoss, attach
from simreg.capture import Attached


class Model(nn.Module):
    """A causal transformer of one layer on bytes."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, L, 256]` of ids `[B, L]`."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.bool)
        return self.head(self.norm(self.layer(self.embed(ids), mask)))


def backward(model: Model, reg: Attached, rows: Tensor, micro_batches: int = 2) -> float:
    """Gradients of the loss per label of all rows `[B, L + 1]`, a few rows at a time; the loss."""
    loss, labels = torch.tensor(0.0), rows[:, 1:].numel()  # of the whole batch: both terms' divisor
    for part in rows.chunk(micro_batches):
        ids, targets = part[:, :-1], part[:, 1:]
        ce = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum") / labels
        part_loss = ce + reg(targets, num_items=labels, shift=False)
        part_loss.backward()
        loss += part_loss.detach()
    return loss.item()


def main(steps: int = 50) -> list[float]:
    """Train on the source text of a module of Python; the loss of each step."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    model = Model()
    reg = attach(model, SimRegLoss(weight=0.3), module=model.norm)  # its output enters the head
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps // 3)
    for step in range(steps):
        rows = torch.stack([text[i : i + 129] for i in torch.randint(len(text) - 129, (8,))])
        losses.append(backward(model, reg, rows))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1} loss {losses[-1]:.3f} pos_cos {reg.metrics['pos_cos']:.2f}")
    return losses


if __name__ == "__main__":
    main()
