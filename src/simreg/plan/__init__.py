"""What the loss costs on a model and a cluster, from closed formulas: `simreg plan`."""
