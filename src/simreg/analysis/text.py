"""The text that models are looked at on, and how frequent its labels are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simreg.geometry import groups, positives
from simreg.recipe import hub
from simreg.recipe.config import DataConfig
from simreg.recipe.data import Corpus, prepare
from simreg.recipe.errors import UserError
from simreg.recipe.held_out import require_one_text, require_unchanged
from simreg.recipe.trained import Trained

_TOKENIZERS = "*token*", "vocab*", "merges*", "*.model"
_OTHERWISE = "restore it, or name other text with --source"
_STREAM = 1 << 18  # tokens that positive rates are counted in
_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_CHUNKS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Text:
    """`ids` `[R, L]` int64: rows spread evenly over the split. `frequency` `[V]` int64: how often
    each token stands in the training split, whose deciles labels are sorted into. `data`: what
    names the text."""

    corpus: Corpus
    ids: Tensor
    frequency: Tensor
    stream: Tensor
    data: DataConfig


def read(data: DataConfig, tokens: int, split: str) -> Text:
    """At least `tokens` labelled tokens of the split, if it has them."""
    corpus = prepare(data)
    rows = corpus.train if split == "train" else corpus.validation
    wanted = min(len(rows), -(-tokens // (rows.seq_len - 1)))
    chosen = np.linspace(0, len(rows) - 1, wanted).round().astype(int)
    ids = torch.stack([rows[int(i)]["input_ids"] for i in chosen])
    counts = np.zeros(corpus.vocab_size, dtype=np.int64)
    for start in range(0, len(corpus.train.tokens), 1 << 24):
        part = corpus.train.tokens[start : start + (1 << 24)]
        counts += np.bincount(part, minlength=corpus.vocab_size)
    stream = torch.from_numpy(rows.tokens[:_STREAM].astype(np.int64))
    return Text(corpus, ids, torch.from_numpy(counts), stream, data)


def data_of(targets: Sequence[Trained], changes: dict[str, Any]) -> DataConfig:
    """The data of the first run among the targets with `changes`, else of `changes` alone.

    Other text is cut into the tokens of the model that is looked at, never into those of a
    tokenizer trained on it. UserError if there is no run, and no other text either.
    """
    run = next((t for t in targets if t.config is not None), None)
    own = str(next((t.model for t in targets if t.final), targets[0].model))
    if run is None or run.config is None:
        if "source" not in changes:
            raise UserError(
                f"{targets[0].name} is no run of `simreg train`, so its text is not known: name "
                "some with --source"
            )
        return DataConfig(**{"tokenizer": own} | changes)
    data = run.config.data
    if "source" in changes:  # of which nothing is known that was of the run's
        data = DataConfig(seq_len=data.seq_len, cache_dir=data.cache_dir)
    if changes.keys() & {"source", "validation"}:
        changes = {"tokenizer": own} | changes
    return replace(data, **changes)


def check_held_out(targets: Sequence[Trained], text: Text, changes: dict[str, Any]) -> None:
    """UserError if runs were trained on different text, or on other text than what is read now."""
    runs = [t for t in targets if t.corpus is not None]
    if changes.keys() & {"source", "validation"}:
        return
    require_one_text(runs, "analyze them one by one, or name other text with --source")
    require_unchanged(runs, text.corpus, text.data, _OTHERWISE)


def check_tokenizers(targets: Sequence[Trained], corpus: Corpus) -> None:
    """UserError if a model comes with another vocabulary than the text was cut into."""
    vocabulary = corpus.tokenizer.get_vocab()
    for target in targets:
        if not any(any(target.model.glob(name)) for name in _TOKENIZERS):
            continue  # a checkpoint of a run
        if hub.tokenizer(target.model).get_vocab() != vocabulary:
            advice = "; analyze it alone" if len(targets) > 1 else ""
            raise UserError(
                f"{target.name} has another vocabulary than the text was cut into: models are "
                f"compared on the same tokens only{advice}"
            )


def positive_rates(text: Text) -> list[dict[str, Any]]:
    """The share of labels that occur again within the row, for rows of L and chunks of them."""
    decile = groups.deciles(text.stream, text.frequency)
    parts = {name: torch.tensor(list(own)) for name, own in groups.PARTS.items()}
    records = []
    for length in (n for n in _LENGTHS if 8 * n <= len(text.stream)):
        count = len(text.stream) // length
        of_label = decile[: count * length].view(count, length)[:, 1:]
        for chunk in (None, *(c for c in _CHUNKS if c < length)):
            found = positives.has_positive(text.stream, length, chunk)
            rates = {"all": _share(found)}
            rates |= {p: _share(found[torch.isin(of_label, own)]) for p, own in parts.items()}
            records.append({"length": length, "chunk": chunk, **rates})
    return records


def _share(found: Tensor) -> float | None:
    return round(float(found.double().mean()), 6) if found.numel() else None
