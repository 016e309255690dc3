"""On which text runs were trained: what is held out of one may be known to another."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from simreg.recipe.config import DataConfig
from simreg.recipe.data import Corpus, prepare
from simreg.recipe.errors import UserError
from simreg.recipe.trained import Trained


def require_one_text(models: Sequence[Trained], advice: str) -> None:
    """UserError if the runs among `models` were not all trained on the text of the first.

    `advice` ends the message: "were trained on different text: ...".
    """
    runs = [(model, model.config.data) for model in models if model.config is not None]
    for other, data in runs[1:]:
        first, own = runs[0]
        # A fingerprint is of rows of tokens: it tells nothing of a run with other ones.
        if _rows_of(data) == _rows_of(own):
            same = other.corpus == first.corpus  # whatever the files are called
        else:
            same = _text_of(data) == _text_of(own)
        if not same:
            raise UserError(
                f"{first.name} and {other.name} were trained on different text: {advice}"
            )


def require_unchanged(
    runs: Sequence[Trained], corpus: Corpus, config: DataConfig, advice: str
) -> None:
    """UserError if the text of a run is not what it was trained on any more.

    `corpus` is what `config` names now. Where a run has other rows, its own text is cut anew.
    """
    now = {_rows_of(config): corpus.fingerprint}
    for run in runs:
        if run.config is None:
            continue
        rows = _rows_of(run.config.data)
        if rows not in now:
            own = replace(run.config.data, cache_dir=config.cache_dir)
            now[rows] = prepare(own).fingerprint
        if run.corpus != now[rows]:
            raise UserError(
                f"the text of {run.name} has changed since it was trained (or is cut otherwise by "
                "this version, if it is several files of text), so held-out documents may be among "
                f"those it has seen: {advice}"
            )


def _rows_of(config: DataConfig) -> tuple[str, int]:
    """What rows of tokens depend on besides the text."""
    return config.tokenizer, config.seq_len


def _text_of(config: DataConfig) -> tuple[Any, ...]:
    """What decides which documents are held out."""
    return (
        *(config.source, config.validation, config.validation_fraction),
        *(config.text_field, config.max_tokens),
    )
