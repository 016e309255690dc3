"""`simreg train`: from text to a trained model with one command."""
