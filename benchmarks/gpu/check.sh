#!/bin/bash
# Checks and measures what needs one GPU; each part under its own limit, and one that fails stops no other.
#
#   OUT=folder benchmarks/gpu/check.sh [tests|steps|kernels|tp ...]          (tp: two GPUs)
#
# Wheels of what the machine's Python lacks may lie in .whl/.
set -u
OUT=${OUT:-gpu_check}
mkdir -p "$OUT"
site=${TMPDIR:-/tmp}/diptych-site
export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

part() { # name, seconds, command...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1
    echo "== $name: exit $? after $((SECONDS - started)) s"
    tail -n 30 "$OUT/$name.txt" | cut -c1-420
}

for wanted in "${@:-tests steps kernels}"; do
    for name in $wanted; do
        case $name in
        tests)
            part tests 200 python3 -m pytest tests/kernels tests/worker -q -m gpu --timeout 90 --tb short -rf \
                -p no:cacheprovider -p no:benchmark
            ;;
        steps)
            part step135m 60 python3 benchmarks/gpu_step.py --shape 135m --triton --output "$OUT/step135m.json"
            part step8b 240 python3 benchmarks/gpu_step.py --shape 8b --output "$OUT/step8b.json"
            ;;
        tp)
            part tp_tests 110 python3 -m pytest tests/worker -q -m gpu2 --timeout 100 --tb short -p no:cacheprovider \
                -p no:benchmark
            part tp_collectives 70 python3 benchmarks/gpu_tp.py --part collectives --output "$OUT/tp_collectives.json"
            part tp_tokens 150 python3 benchmarks/gpu_tp.py --part tokens --output "$OUT/tp_tokens.json"
            part tp_kill 80 python3 benchmarks/gpu_tp.py --part kill --output "$OUT/tp_kill.json"
            part tp_speed 280 python3 benchmarks/gpu_tp.py --part speed --output "$OUT/tp_speed.json"
            ;;
        kernels) part kernels 150 python3 benchmarks/gpu_kernels.py ;;
        *) echo "no part $name: tests, steps, kernels, tp" ;;
        esac
    done
done
