"""Tasks without a download, from documents that were held out of training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from simreg.evaluation import excerpts
from simreg.evaluation.outcome import Outcome
from simreg.evaluation.scoring import Scorer, encode_pair, prefix_token
from simreg.recipe import cache, data
from simreg.recipe.data import Corpus
from simreg.recipe.errors import UserError
from simreg.recipe.held_out import require_one_text, require_unchanged
from simreg.recipe.processes import warn
from simreg.recipe.sources import (
    Source,
    in_pieces,
    interleave,
    listed,
    resolve,
    shared,
    still_there,
)
from simreg.recipe.trained import Trained

CLOZE, BITS = "heldout-cloze", "heldout-bits"
OFFLINE = (CLOZE, BITS)
ITEMS = 1000
"""Cloze items without --limit."""
_DOCUMENT = 4096  # characters read of a document, so that no long one decides alone
_AN_ITEM = 500  # characters that bits per byte reads for each cloze item
_VERSION = 2  # of what these tasks are; a new number makes cached results invisible


@dataclass
class Cloze:
    """Which of four continuations follows: the one with the largest log-likelihood is chosen.

    Normalised: the one whose log-likelihood the context raises most (pointwise mutual information,
    the harness's `acc_mutual_info`), so that common words are no advantage.
    """

    items: list[excerpts.Item]
    source: str
    name: str = CLOZE
    note: str = ""

    def key(self) -> dict[str, Any]:
        """The items, documents included: cached outcomes of a version without those don't count."""
        return {
            "task": self.name,
            "version": _VERSION,
            "items": cache.name([repr(item) for item in self.items]),
        }

    def run(self, scorer: Scorer, tokenizer: Any, advance: Callable[[int], None]) -> Outcome:
        """Score a model."""
        pairs = [
            encode_pair(tokenizer, item.context, choice)
            for item in self.items
            for choice in item.choices
        ]
        prefix = prefix_token(tokenizer)
        alone = [([prefix], continuation) for _, continuation in pairs]
        scores = [score for score, _ in scorer([*pairs, *alone], advance)]
        given, free = scores[: len(pairs)], scores[len(pairs) :]
        gained = [score - without for score, without in zip(given, free, strict=True)]
        documents = [item.document for item in self.items]
        return Outcome("acc", self._hits(given), self._hits(gained), clusters=documents)

    def _hits(self, scores: list[float]) -> list[float]:
        """1 for each item whose true continuation has the largest score (the first, if several)."""
        hits = []
        for i, item in enumerate(self.items):
            four = scores[excerpts.CHOICES * i : excerpts.CHOICES * (i + 1)]
            hits.append(float(four.index(max(four)) == item.gold))
        return hits


@dataclass
class Bits:
    """Bits per byte of held-out text, an item a document (its first 4,096 characters)."""

    texts: list[str]
    source: str
    name: str = BITS
    note: str = ""

    def key(self) -> dict[str, Any]:
        """The texts."""
        return {"task": self.name, "version": _VERSION, "items": cache.name(self.texts)}

    def run(self, scorer: Scorer, tokenizer: Any, advance: Callable[[int], None]) -> Outcome:
        """Score a model."""
        prefix, pairs, owner = prefix_token(tokenizer), [], []
        for i, text in enumerate(self.texts):
            tokens = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]  # as in training: <|endoftext|> in a text is text
            parts = excerpts.windows(tokens, prefix, scorer.max_length)
            pairs += parts
            owner += [i] * len(parts)
        values = [0.0] * len(self.texts)
        for i, (log_likelihood, _) in zip(owner, scorer(pairs, advance), strict=True):
            values[i] += excerpts.bits(log_likelihood)
        weights = [float(len(text.encode())) for text in self.texts]
        return Outcome("bits_per_byte", values, weights=weights)


def load(
    names: Sequence[str],
    models: Sequence[Trained],
    text: Sequence[str],
    limit: int | None,
    *,
    corpus: Corpus | None = None,
) -> list[Cloze | Bits]:
    """The offline tasks of these names.

    Their documents are those of the files (or other sources) `text`, else the validation split of
    the runs' own corpus. UserError if there is neither, or if the runs have different corpora. Of
    two tasks, cloze items are left out where the text is too little for them.
    """
    documents, source = _from_text(text, models) if text else _from_runs(models, corpus)
    if not documents:
        raise UserError("--text: no text in it" if text else "the held-out documents have no text")
    count = limit or ITEMS
    tasks: list[Cloze | Bits] = []
    for name in names:
        if name == BITS:
            tasks.append(Bits(_first(documents, count * _AN_ITEM), source))
            continue
        try:
            tasks.append(Cloze(excerpts.cloze(documents, count, seed=0), source))
        except UserError as error:
            if len(names) == 1:
                raise
            warn(f"{error}; left out")  # bits per byte can be had of any text
    return tasks


def _first(documents: Sequence[str], characters: int) -> list[str]:
    """The beginnings of the first documents, so many characters in all."""
    taken: list[str] = []
    for document in documents:
        if characters <= 0:
            break
        taken.append(document[: min(_DOCUMENT, characters)])
        characters -= len(taken[-1])
    return taken


def _from_text(text: Sequence[str], models: Sequence[Trained] = ()) -> tuple[list[str], str]:
    sources = resolve(list(text), "text", setting="--text")
    _check_unseen(sources, models)
    if len(sources) == 1:  # of several nothing need be held out: they stay as they are
        sources = in_pieces(sources)
    documents = [document for document in interleave(sources) if document.strip()]
    return documents, f"text {cache.name([source.key for source in sources])[:12]}"


def _check_unseen(sources: Sequence[Source], models: Sequence[Trained]) -> None:
    """UserError for what a run was trained on: a file wherever it lies and whatever its name, or a
    dataset of the Hub."""
    runs = [(m.name, m.config.data.source) for m in models if m.config is not None]
    for name, spec in {str(spec): (name, spec) for name, spec in runs}.values():
        known = []
        for item in listed(spec):
            known += (there := still_there(item))
            if not there:
                warn(f"--text: {item!r} names no file here, so {name} may have been trained on it")
        if found := shared(sources, known):
            raise UserError(
                f"--text: {name} was trained on {found.title}: name text that no model has seen "
                "(without --text it is what the run itself held out)"
            )


def _from_runs(models: Sequence[Trained], corpus: Corpus | None) -> tuple[list[str], str]:
    """The validation split, decoded; the same text whatever the tokenizers of the others."""
    runs = [model for model in models if model.config is not None]
    if not runs:
        raise UserError(
            f"{models[0].name} is no run of `simreg train`, so its held-out text is not known: "
            "name some with --text FILES, or choose --suite small or paper"
        )
    require_one_text(
        runs, "evaluate them one by one, or name text that neither has seen with --text FILES"
    )
    first = runs[0]
    assert first.config is not None
    advice = "restore it, or name text that the model has not seen with --text FILES"
    if corpus is None:
        try:
            corpus = data.prepare(first.config.data)
        except UserError as error:
            raise UserError(f"the text of {first.name} is not there ({error}): {advice}") from None
    require_unchanged(runs, corpus, first.config.data, advice)
    kept = [text for text in documents(corpus) if text.strip()]
    return kept, f"validation split of corpus {corpus.fingerprint[:12]}"


def documents(corpus: Corpus) -> Iterator[str]:
    """The documents of the validation split, without their eos."""
    start = 0
    for end in corpus.validation.ends.tolist():
        ids = corpus.validation.tokens[start : end - 1].tolist()
        yield str(corpus.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        start = end
