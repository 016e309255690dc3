"""The pictures of an analysis, each with a text that says the same to those who can't see it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from simreg.analysis import describe, plots
from simreg.theme import PRINT, Theme

Results = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A picture: its file name, what it shows, how it is drawn and how it is told."""

    name: str
    title: str
    caption: str
    make: Callable[[Results, Theme], Figure | None]
    describe: Callable[[Results], str]

    def draw(self, results: Results, theme: Theme = PRINT) -> Figure | None:
        """The figure, or None if there is nothing to draw."""
        return self.make(results, theme)


PICTURES = (
    Picture(
        "margins",
        "Margins",
        "Share of tokens by margin, mean over seeds. Above: logit of the label minus the best "
        "other logit. Below: the same of cosines between hidden state and rows of the LM head. "
        "Left of 0 the model is wrong. Dotted: medians.",
        plots.margins,
        describe.margins,
    ),
    Picture(
        "deciles",
        "By frequency of the label",
        "Each decile holds a tenth of the tokens: 1 the most frequent labels, 10 the rarest. Bars: "
        "mean over seeds; lines: 95 % Student-t intervals (of paired differences where there is a "
        "reference). One seed without a reference: 1.96 standard errors, which bars of classes "
        "do not have.",
        plots.deciles,
        describe.deciles,
    ),
    Picture(
        "cosines",
        "Cosines within and between classes",
        "Mean cosine of a token to others with the same label (solid) and with other labels "
        "(dashed), over training. Thin: single seeds, those with the most points.",
        plots.cosines,
        describe.cosines,
    ),
    Picture(
        "explanation",
        "Margin against loss",
        "A dot is a trained model or a checkpoint: mean loss over the tokens of the group against "
        "their mean margin.",
        plots.explanation,
        describe.explanation,
    ),
    Picture(
        "map",
        "Embeddings of a few labels",
        "Unit embeddings of up to 60 tokens of each label, one seed an arm. Each arm has axes "
        "of its own; distances in such a map say less than the numbers above.",
        plots.embedding_map,
        describe.embedding_map,
    ),
    Picture(
        "positives",
        "How many tokens have a positive",
        "Share of labels that occur again in the same row of L tokens. A chunk of c positions "
        "counts like a row of c: crosses are chunks of the longest rows.",
        plots.positives,
        describe.positives,
    ),
)
