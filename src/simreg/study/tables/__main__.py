"""`python -m simreg.study.tables [--check] FILE.md ...`: redraw tables, or say which are stale."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.errors import UserError
from simreg.study.tables import document
from simreg.study.tables.kinds import KINDS

ROOT = Path(__file__).parents[4]
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/results.md",
    "docs/results-no-bias.md",
    "docs/results-trials.md",
)
_HELP = f"""Rewrite what stands between <!-- table: KIND PATH [PATH...] [key=value ...] --> and
<!-- /table -->, each on a line of its own, from the JSON files named. Paths are relative to the
folder above the page that has a pyproject.toml. Kinds and their options:
{"; ".join(f"{name} ({', '.join(kind.options) or 'none'})" for name, kind in KINDS.items())}."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 if a check fails, 2 for a user's mistake."""
    parser = argparse.ArgumentParser("python -m simreg.study.tables", description=_HELP)
    parser.add_argument("--check", action="store_true", help="change nothing, name what is stale")
    parser.add_argument("pages", nargs="*", metavar="FILE.md", help=f"default: {', '.join(PAGES)}")
    options = parser.parse_args(arguments)
    paths = [Path(page) for page in options.pages] or [ROOT / page for page in PAGES]
    try:
        # All are drawn before any is written: a mistake changes nothing.
        drawn = {path: document.redraw(path) for path in paths}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [marker for page in drawn.values() for marker in page.stale]
    for marker in stale:
        print(f"{marker} {'is stale' if options.check else 'drawn anew'}")
    if options.check:
        return 1 if stale else 0
    for path, page in drawn.items():
        if page.stale:
            write_atomically(path, page.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
