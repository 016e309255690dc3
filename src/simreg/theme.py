"""How figures look: colours and matplotlib settings."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours: of text, of the grid, of the reference and then of each other series in turn."""

    text: str
    grid: str
    series: tuple[str, ...]
    background: str = "none"

    def of(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> colour; the first is the reference, later ones share the rest in turn."""
        first, *others = names
        rest = self.series[1:]
        return {first: self.series[0]} | {n: rest[i % len(rest)] for i, n in enumerate(others)}

    @property
    def rc(self) -> Any:
        """matplotlib settings (untyped: its stubs list every key as a literal)."""
        return {
            "figure.facecolor": self.background,
            "axes.facecolor": "none",
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "axes.edgecolor": self.text,
            "xtick.color": self.text,
            "ytick.color": self.text,
            "grid.color": self.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.linewidth": 0.6,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "font.size": 9.5,
            "legend.frameon": False,
        }


PRINT = Theme(
    text="#1f2328",
    grid="#d9dee4",
    series=("#5b6470", "#0b6bcb", "#c2410c", "#0f8a5f", "#8b3fc7", "#a16207"),
    background="#ffffff",
)


def save(figure: "Figure | None", folder: Path, name: str) -> bool:
    """NAME.png and NAME.svg in `folder`, the same bytes whenever the figure is the same.

    Without a figure those of an earlier one are removed. Returns whether there is one.
    """
    if figure is None:
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        return False
    from matplotlib import rc_context

    figure.savefig(folder / f"{name}.png", dpi=160)
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return True
