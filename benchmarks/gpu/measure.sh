#!/usr/bin/env bash
# benchmarks/gpu/measure.sh WHAT: one measurement, to benchmarks/results/. At most eight minutes; no network.
names="captured loss variants chunks long rows step fuzz-triton fuzz-blockwise tune"
if ! printf '%s\n' $names | grep -qxF -- "${1:-}"; then
  echo "expected one of: $names" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/check.sh"
out=benchmarks/results
limit() { timeout --signal INT "${seconds:-400}" "$@"; }
step() { seconds=130 limit python benchmarks/step.py --seconds 30 --pairs 12 --out "$out/$1" --set "$2"; }
case "$1" in
  captured) # what Python costs where the loss is launched kernel by kernel
    limit python -m simreg.cli bench --shapes 1024x768 2048x768 4096x768 4096x2048 8192x4096 \
      --contenders triton "triton, captured" --seconds 2 --out $out/captured-cuda.json ;;
  loss) # beside every peer
    limit python -m simreg.cli bench --shapes 1024x768 2048x768 4096x768 16384x768 4096x2048 8192x4096 \
      --seconds 2 --rounds 9 --out $out/loss-cuda.json ;;
  variants)
    limit python -m simreg.cli bench --shapes 2048x768 8192x4096 --variants out in decoupled --dtypes bfloat16 float16 float32 \
      --contenders triton --seconds 3 --out $out/variants-cuda.json ;;
  chunks) # does time fall with the pairs?
    limit python -m simreg.cli bench --shapes 4096x2048 8192x4096 --chunks 0 256 512 1024 2048 \
      --contenders triton --seconds 3 --out $out/chunks-cuda.json ;;
  long)
    limit python -m simreg.cli bench --shapes 1x131072x4096 --contenders triton --rounds 3 --seconds 5 --out $out/long-cuda.json ;;
  rows) # the loss as a row of matrix products of a library and what is between them, beside tiles
    limit python -m simreg.cli bench --seconds 3 --contenders triton "sharded, one rank" --out $out/rows-cuda.json ;;
  step) # of whole models: the push, and with it the layers within, which is the default
    small=model.preset=llama-130m,data.seq_len=2048,train.batch_rows=32
    large=model.preset=llama-1b,data.seq_len=4096,train.batch_rows=8,train.gradient_checkpointing=true
    step step-llama-130m-quarter-cuda.json "$small"
    step step-llama-1b-quarter-cuda.json "$large"
    step step-llama-1b-push-cuda.json "$large,simreg.depths=[]" ;;
  fuzz-triton | fuzz-blockwise)
    python benchmarks/fuzz.py "${1#fuzz-}" --jobs 7 --minutes 6.5 ;;
  tune)
    limit python benchmarks/tune.py --jobs 8 ;;
esac
