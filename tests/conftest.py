"""Tests see no GPU, so that they are the same everywhere, but those of `-m gpu`.

Triton interprets its kernels then; its switch is read when they are defined, before any test.
"""

import os
import sys

import pytest
import torch

# What deterministic algorithms, which the tests of the kernels switch on, ask of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _prepare(gpu: bool) -> None:
    """Before anything asks for a GPU or imports a kernel."""
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed says on stdout that it found no GPU
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


# Where single files are named, conftests below import kernels before `pytest_configure`. Workers of
# xdist, which have other arguments, inherit what was set here.
if "PYTEST_XDIST_WORKER" not in os.environ and not {"gpu", "-mgpu"} & {*sys.argv}:
    _prepare(gpu=False)


def pytest_configure(config: pytest.Config) -> None:
    """The expression as pytest reads it."""
    _prepare(config.option.markexpr == "gpu")
