"""SimReg in the training engines people use: a module or package an engine, and what they share."""
