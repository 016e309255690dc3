#!/usr/bin/env bash
# Is there a CUDA GPU, and are the kernels right on it? Less than a minute; every other script here begins with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python - <<'EOF'
import sys

try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch: activate the environment that simreg is installed in")
if not torch.cuda.is_available():
    sys.exit("no CUDA GPU: torch.cuda.is_available() is False")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
EOF
tests=tests/kernels/test_cuda.py
timeout 240 python -m pytest -q -m gpu "$tests"::test_a_long_sequence_keeps_to_its_memory \
  "$tests"::test_captured_in_a_graph "$tests"::test_as_accurate_as_the_naive_loss\[{0,1,2,3,4,5}-triton\]
