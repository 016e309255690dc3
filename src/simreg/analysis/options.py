"""The command line of `simreg analyze`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simreg.geometry.collapse import PAIRS
from simreg.recipe.numbers import Whole, default_of


@dataclass
class AnalyzeOptions:
    """Measure the geometry of the embeddings of trained models, and compare arms over seeds.

    Runs that differ in their seed alone are one arm, as are models with the same ARM= before them.
    Writes results.json and pictures; hidden states are cached, so that a second analysis costs no
    forward pass. docs/analysis.md says what the numbers mean.
    """

    models: tyro.conf.Positional[list[str]]
    """Folders of runs, of studies or models (or above runs), or Hub ids, as in `simreg analyze
    baseline=runs/a simreg=runs/b`."""
    tokens: Whole = 30_000
    """Labelled tokens of text to look at."""
    series: bool = False
    """Also look at the checkpoints that runs have kept."""
    reference: str | None = None
    """The arm that others are compared with; None: the study's, `baseline`, or the first."""
    source: list[str] | None = None
    """Other text than that of the first run: as `data.source` of `simreg train`."""
    validation: list[str] | None = None
    """With it, the validation text (None: documents held out of the source)."""
    seq_len: Whole | None = None
    """Tokens a row; None: as the runs were trained with."""
    split: Literal["validation", "train"] = "validation"
    """Which part of the text."""
    least: Whole = 5
    """Tokens that a class (label) needs to count in class means and variances."""
    pairs: Whole = PAIRS
    """Pairs of classes that CDNV is estimated from."""
    labels: list[str] | None = None
    """Tokens to show in the map of embeddings, such as `--labels " the" ,`; None: chosen."""
    projection: Literal["pca", "umap"] = "pca"
    """How the map is made; umap needs umap-learn."""
    cache_dir: str = "~/.cache/simreg"
    """Where hidden states are kept (4·d bytes a token and model)."""
    out: Annotated[Path | None, default_of("see below")] = None
    """Folder for the results; default: `geometry` in the study's folder, else runs/geometry, or
    with a number where that holds those of another command line."""
