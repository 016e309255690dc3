"""Hidden states of a model on a sample of text: one forward pass, then a cache on the disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simreg.geometry.sample import Sample
from simreg.recipe import assemble, cache, hub
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.trained import Trained

_LAYOUT = 2  # of the cache; a new number makes old entries invisible
_TOKENS = 4096  # a forward pass
_TOLERANCE = 1e-3  # of logits, relative to the largest


@dataclass(frozen=True)
class States:
    """A sample of a model's hidden states, and its LM head: `weight` `[V, d]`, `bias` `[V]`."""

    sample: Sample
    weight: Tensor
    bias: Tensor | None
    weights_hash: str


def collect(target: Trained, ids: Tensor, cache_dir: str, tell: Callable[[str], None]) -> States:
    """The states of `target` on the rows `ids` `[R, L]` int64; T = R·(L − 1), float32.

    Position t of a row is labelled with token t + 1; the last has no label and is left out. Hidden
    states are looked up by a hash of the weights and of the tokens, and read as they are needed.

    Raises:
        UserError: the model cannot be loaded, has other tokens or shorter rows, its states are not
            finite, or its logits are not W·h + b.
    """
    model = hub.load(target.model, target.name)
    weight, bias = _head(model, target)
    if int(ids.max()) >= len(weight):
        raise UserError(
            f"{target.name}: the text has token {int(ids.max())}, its vocabulary only "
            f"{len(weight)}: it was made for another tokenizer"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise UserError(
            f"{target.name}: rows of {ids.shape[1]} tokens are longer than its {longest} "
            "positions: give --seq-len"
        )
    digest = _hash(model)
    key = hashlib.blake2b(
        json.dumps([_LAYOUT, digest, str(model.config), _digest(ids)]).encode(), digest_size=16
    ).hexdigest()
    folder = expanded(cache_dir) / "hidden" / key
    make = _Forward(model, target, ids, (weight, bias), tell)
    facts = cache.entry(folder, make, setting="--cache-dir")
    rows, length = ids.shape
    shape = (rows * (length - 1), facts["width"])
    hidden = torch.from_numpy(np.memmap(folder / "hidden.f32", np.float32, "c", shape=shape))
    labels = ids[:, 1:].reshape(-1)
    place = torch.arange(rows).repeat_interleave(length - 1)
    return States(Sample.of(hidden, labels, place), weight, bias, digest)


class _Forward:
    """Writes the hidden states of all rows into a folder; see `cache.entry`."""

    def __init__(
        self,
        model: PreTrainedModel,
        target: Trained,
        ids: Tensor,
        head: tuple[Tensor, Tensor | None],
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.target, self.ids, self.head, self.tell = model, target, ids, head, tell

    @torch.no_grad()
    def __call__(self, folder: Path) -> dict[str, Any]:
        device = assemble.device()
        model: Any = self.model.to(device).eval()  # type: ignore[arg-type]
        decoder = model.get_decoder()
        width = 0
        with (folder / "hidden.f32").open("wb") as file:
            batches = torch.split(self.ids, max(1, _TOKENS // self.ids.shape[1]))
            for number, batch in enumerate(batches):
                self.tell(f"{self.target.title}: forward pass {number + 1} of {len(batches)}")
                batch = batch.to(device)
                hidden = decoder(input_ids=batch, use_cache=False).last_hidden_state.float().cpu()
                if number == 0:
                    self._check(model, batch[:1], hidden[0])
                if not bool(hidden.isfinite().all()):
                    raise UserError(f"{self.target.name}: its hidden states are NaN or infinite")
                width = hidden.shape[-1]
                file.write(hidden[:, :-1].contiguous().numpy().tobytes())
        return {"width": width}

    def _check(self, model: Any, row: Tensor, hidden: Tensor) -> None:
        """Everything below reads logits as W·h + b: see once that they are."""
        logits = model(input_ids=row, use_cache=False).logits[0].float().cpu()
        weight, bias = self.head
        own = hidden @ weight.T + (0 if bias is None else bias)
        if not (own - logits).abs().max() <= _TOLERANCE * logits.abs().max().clamp_min(1):
            raise UserError(
                f"{self.target.name}: its logits are not W·h + b of its last hidden state (scaled "
                "or capped logits, or a NaN); margins of such models are not supported"
            )


def _head(model: PreTrainedModel, target: Trained) -> tuple[Tensor, Tensor | None]:
    inside: Any = model
    head = inside.get_output_embeddings()
    if getattr(head, "weight", None) is None or not hasattr(model, "get_decoder"):
        raise UserError(f"{target.name}: {type(model).__name__} has no LM head to compare with")
    bias = getattr(head, "bias", None)
    return head.weight.detach().float(), None if bias is None else bias.detach().float()


def _hash(model: PreTrainedModel) -> str:
    """Of all weights: what the cache and the results know a model by."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(ids: Tensor) -> str:
    return hashlib.blake2b(ids.numpy().tobytes() + str(ids.shape).encode()).hexdigest()[:32]
