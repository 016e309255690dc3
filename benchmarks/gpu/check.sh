#!/usr/bin/env bash
# Is there a CUDA GPU, and are the kernels right on it? Half a minute; the other scripts begin with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python - <<'EOF'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit("no CUDA GPU: torch.cuda.is_available() is False")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
EOF
python -m pytest -q -m gpu tests/kernels/test_cuda.py -k "1- or 2- or captured or memory" "$@"
