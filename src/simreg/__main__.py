"""`python -m simreg`, as `simreg`."""

from simreg.cli import run

if __name__ == "__main__":
    run()
