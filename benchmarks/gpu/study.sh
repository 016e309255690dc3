#!/usr/bin/env bash
# benchmarks/gpu/study.sh STUDY.yaml [flags of simreg compare]: what eight minutes train of a study, by several
# processes that share its runs; again until it says that none is missing. JOBS=14 for small models.
source "$(dirname "${BASH_SOURCE[0]}")/check.sh"
# Without it processes take turns on the GPU.
if command -v nvidia-cuda-mps-control >/dev/null && nvidia-cuda-mps-control -d 2>/dev/null; then
  trap 'echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true' EXIT # what is measured later is not to be its client
fi
mkdir -p runs
rm -f runs/study-*.log # of more processes than now, perhaps
export OMP_NUM_THREADS=1
jobs=()
# TERM, since processes that a script starts heed INT only once they train; they save, and stop.
stop() {
  trap '' INT TERM
  kill -TERM "${jobs[@]}" 2>/dev/null || true
  wait "${jobs[@]}" || true
  exit 130
}
trap stop INT TERM
for i in $(seq "${JOBS:-6}"); do
  python -m simreg.cli compare "$@" --stop-after 6.5 >"runs/study-$i.log" 2>&1 &
  jobs+=($!)
  if [ "$i" = 1 ]; then # it tokenises
    sleep 15 &
    wait $! # which signals interrupt
  fi
done
failed=0
for job in "${jobs[@]}"; do
  status=0
  wait "$job" || status=$?
  # A process that failed counts for more than one whose time ran out.
  if [ "$failed" = 0 ] || [ "$failed" = 130 ] && [ "$status" != 0 ]; then failed=$status; fi
done
tail -n 3 runs/study-*.log
if [ "$failed" = 0 ]; then echo "all runs are finished"; else echo "status $failed: 130 is time that ran out, run it again"; fi
exit "$failed"
