#!/usr/bin/env bash
# All tests that need a GPU, in several processes where pytest-xdist is installed.
source "$(dirname "${BASH_SOURCE[0]}")/check.sh"
parallel=()
if python -c "import xdist" 2>/dev/null; then parallel=(-n "${JOBS:-11}"); fi
timeout 420 python -m pytest -q -m gpu "${parallel[@]}" tests/kernels tests/parallel tests/bench
