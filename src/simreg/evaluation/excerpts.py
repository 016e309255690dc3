"""Cloze items and windows for bits per byte, made from held-out documents."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simreg.evaluation.scoring import Pair
from simreg.recipe.errors import UserError

CONTEXT, LEAST_CONTEXT, CONTINUATION = 240, 40, 40
"""Characters: a context at most and at least, a continuation about."""
CHOICES = 4
_EXACT_TRIES = 400
_WORD_END = re.compile(r"(?<=\S)(?=\s)")
_FEWEST = 1 / 60  # word ends a character; with fewer, the script does without spaces


@dataclass(frozen=True)
class Item:
    """A context and what may follow it; `choices[gold]` does, the others come from elsewhere."""

    context: str
    choices: tuple[str, ...]
    gold: int
    document: int
    """Which one the context was cut from: its items are not independent."""


class _Document:
    """A text and where in it a word ends; after any character, if its script has no spaces."""

    def __init__(self, text: str) -> None:
        self.text = text
        ends = [match.start() for match in _WORD_END.finditer(text)]
        if len(ends) <= _FEWEST * len(text):
            ends = [end for end in range(1, len(text) + 1) if not text[end - 1].isspace()]
        self.ends, last = ends, len(text) - 2 * CONTINUATION
        # Nobody could tell what follows where nothing does for a while, as in a wide table.
        self.starts = [
            end
            for end in ends
            if LEAST_CONTEXT <= end <= last and not text[end : end + CONTINUATION].isspace()
        ]
        self._ends = set(self.ends)

    def end(self, start: int) -> int:
        """Where a continuation from `start` ends: the first word end after 40 characters."""
        least = start + CONTINUATION
        return next((end for end in range(least, least + CONTINUATION) if end in self._ends), least)

    def piece(self, start: int, length: int) -> tuple[int, str]:
        """By how much the word end nearest to `length` characters misses it, and the piece."""
        for miss in range(CONTINUATION // 2):
            for end in (start + length - miss, start + length + miss):
                if end in self._ends:
                    return miss, self.text[start:end]
        return CONTINUATION, self.text[start : start + length]


def cloze(documents: Sequence[str], count: int, seed: int = 0) -> list[Item]:
    """Items of four choices, the same for the same documents and seed; a shorter list begins a
    longer one.

    A context of up to 240 characters ends at a word; the continuations, of about 40 characters, are
    what follows there and three pieces of other documents with as many characters (to within a
    few where no such piece was found). UserError if the documents are too few or too short.
    """
    usable = [doc for doc in map(_Document, dict.fromkeys(documents)) if doc.starts]
    if len(usable) < 2 or sum(len(doc.starts) for doc in usable) < CHOICES:
        raise UserError(
            f"heldout-cloze needs two held-out documents or more of at least "
            f"{LEAST_CONTEXT + 2 * CONTINUATION} characters, and there are {len(usable)}: name "
            "more text with --text"
        )
    # random() alone: its stream is the same in every version of Python.
    draw = random.Random(seed).random
    items: list[Item] = []
    taken: set[tuple[int, int]] = set()
    for _ in range(20 * count):
        if len(items) == count:
            break
        which = int(draw() * len(usable))
        document = usable[which]
        start = document.starts[int(draw() * len(document.starts))]
        if (which, start) not in taken:
            taken.add((which, start))
            items.append(_item(usable, which, start, draw))
    return items


def _item(usable: list[_Document], which: int, start: int, draw: Callable[[], float]) -> Item:
    document = usable[which]
    truth = document.text[start : document.end(start)]
    choices: list[str] = []
    while len(choices) < CHOICES - 1:
        best = (2 * CONTINUATION, "")
        for _ in range(_EXACT_TRIES):
            other = int(draw() * (len(usable) - 1))
            elsewhere = usable[other + (other >= which)]
            at = elsewhere.starts[int(draw() * len(elsewhere.starts))]
            miss, piece = elsewhere.piece(at, len(truth))
            if piece not in (truth, *choices):
                best = min(best, (miss, piece), key=lambda found: found[0])
            if best[0] == 0:
                break
        if not best[1]:
            raise UserError(
                "heldout-cloze finds no three different continuations: the held-out documents are "
                "too much alike or too few; name more text with --text"
            )
        choices.append(best[1])
    gold = int(draw() * CHOICES)
    choices.insert(gold, truth)
    before = document.ends
    begin = max(0, start - CONTEXT)
    if begin:  # at a word, if one begins in time
        begin = next((e for e in before if begin <= e <= start - LEAST_CONTEXT), begin)
    return Item(document.text[begin:start].lstrip(), tuple(choices), gold, which)


def windows(tokens: list[int], prefix: int, max_length: int) -> list[Pair]:
    """Pairs that predict every token once, with a context of at least one.

    The first window begins with `prefix`, a later one with the token before it; the last, where
    fewer tokens are left, is filled up with context (as lm-evaluation-harness does).
    """
    stream = [prefix, *tokens]  # stream[i + 1] is predicted from stream[: i + 1]
    pairs = []
    for done in range(0, len(tokens), max_length):
        end = min(done + max_length, len(tokens))
        begin = max(0, end - max_length)
        pairs.append((stream[begin : done + 1], stream[done + 1 : end + 1]))
    return pairs


def bits(log_likelihood: float) -> float:
    """Nats of probability as bits of code."""
    return -log_likelihood / math.log(2)
