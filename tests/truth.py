"""SimReg by its definition: Python loops over pairs of tokens, in float64, gradient by autograd."""

import torch
from torch import Tensor


def brute_force(
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    variant: str = "out",
    push: float = 0.0,
    push_above: float = 0.5,
    segments: Tensor | None = None,
    chunk_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Per-token losses `[B, L]` of `hidden [B, L, d]`, `labels [B, L]`."""
    batch, length = labels.shape
    rows = []
    for b in range(batch):
        e = [h / h.norm().clamp_min(1e-6) for h in hidden[b].double()]
        y = labels[b].tolist()

        def interact(i: int, j: int, b: int = b, y: list[int] = y) -> bool:
            return (
                i != j
                and y[j] != ignore_index
                and (segments is None or bool(segments[b, i] == segments[b, j]))
                and (chunk_size is None or i // chunk_size == j // chunk_size)
            )

        for i in range(length):
            candidates = [j for j in range(length) if interact(i, j)]
            positives = [j for j in candidates if y[j] == y[i]]
            if y[i] == ignore_index or not candidates:
                rows.append((0 * e[i]).sum())
                continue
            cosines = [e[i].dot(e[j]) for j in candidates]
            excess = push * sum((c - push_above).relu() for c in cosines) / len(candidates)
            if not positives:
                rows.append(excess)
                continue
            s = {j: e[i].dot(e[j]) / temperature for j in candidates}
            if variant == "out":
                lse = torch.stack([s[j] for j in candidates]).logsumexp(0)
                loss = lse - sum(s[p] for p in positives) / len(positives)
            elif variant == "in":
                shift = max(s[j].item() for j in positives)
                mean = sum((s[p] - shift).exp() for p in positives) / len(positives)
                lse = torch.stack([s[j] for j in candidates]).logsumexp(0)
                loss = lse - (mean.log() + shift)
            else:
                negatives = [j for j in candidates if y[j] != y[i]]
                terms = [
                    torch.stack([0 * s[p]] + [s[n] - s[p] for n in negatives]) for p in positives
                ]
                loss = sum(t.logsumexp(0) for t in terms) / len(positives)
            rows.append(loss + excess)
    return torch.stack(rows).view(batch, length)
