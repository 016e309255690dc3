"""Rival objectives behind the same call as SimReg, for comparisons: one file each."""
