"""`python -m simreg`, as `simreg`."""

from simreg.cli import run

run()
