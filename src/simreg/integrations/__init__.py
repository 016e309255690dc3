"""SimReg in the training engines people already use, a file an engine."""
