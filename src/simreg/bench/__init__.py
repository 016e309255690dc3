"""`simreg bench`: time and memory of the loss beside its peers and bare matrix products."""
