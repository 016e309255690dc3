"""Without a GPU Triton interprets the kernels; its switch is read when they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What deterministic algorithms, which the tests of the kernels switch on, ask of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
