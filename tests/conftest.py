"""Without a GPU Triton interprets the kernels; its switch is read when they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
