#!/bin/bash
# Checks and measures what needs one GPU; each part under its own limit, and one that fails stops no other.
#
#   OUT=folder benchmarks/gpu/check.sh [setup|attention|tests|older|model|serve|steps|variants|kernels|power|fp8|tp ...]  (tp: two GPUs)
#
# Wheels of what the machine's Python lacks may lie in .whl/; DIPTYCH_TEST_MODEL names the small model's GGUF file.
set -u
OUT=${OUT:-gpu_check}
mkdir -p "$OUT"
site=${TMPDIR:-/tmp}/diptych-site
export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1
if [ ! -e "$site/.done" ] && ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    touch "$site/.done"
fi
tests=(python3 -m pytest -q --tb short -rf -p no:cacheprovider -p no:benchmark)

part() { # name, seconds, command...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1
    echo "== $name: exit $? after $((SECONDS - started)) s"
    tail -n 40 "$OUT/$name.txt" | cut -c1-420
}

for wanted in "${@:-setup attention tests serve steps variants kernels}"; do
    for name in $wanted; do
        case $name in
        setup) nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv ;;
        attention) part attention 200 python3 benchmarks/gpu_kernels.py prefill ;; # compiles flashinfer's, too
        tests)
            part tests_worker 300 "${tests[@]}" --timeout 90 -m "gpu and not model" -k "not flashinfer" tests/worker &
            part tests_kernels 300 "${tests[@]}" --timeout 90 -m gpu tests/kernels
            wait
            ;;
        older) # as if it were an A100, and an L4 or RTX 4090
            for capability in 80 89; do
                OLDER_GPU=$capability PYTHONPATH=$PYTHONPATH:$PWD/benchmarks/gpu part "older_$capability" 900 "${tests[@]}" \
                    --timeout 90 -p older_gpu -m "gpu and not model" -k "not flashinfer" tests/kernels tests/worker
            done
            ;;
        model) part model 200 "${tests[@]}" --timeout 190 -m model tests/worker/test_cuda_runner.py ;;
        serve)
            part serve 150 python3 benchmarks/gpu_serve.py --output "$OUT/serve8b.json"
            part serve_metrics 90 python3 benchmarks/gpu_serve.py --iterations --load 1x256 --load 64x1024 \
                --output "$OUT/serve8b_metrics.json"
            part serve_fp8 90 python3 benchmarks/gpu_serve.py --quant fp8 --load 1x256 --load 64x1024 \
                --output "$OUT/serve8b_fp8.json"
            ;;
        steps)
            part step135m 60 python3 benchmarks/gpu_step.py --shape 135m --triton --output "$OUT/step135m.json"
            part step8b 150 python3 benchmarks/gpu_step.py --shape 8b --output "$OUT/step8b.json"
            ;;
        tp)
            part tp_tests 110 python3 -m pytest tests/worker -q -m gpu2 --timeout 100 --tb short -p no:cacheprovider \
                -p no:benchmark
            part tp_collectives 70 python3 benchmarks/gpu_tp.py --part collectives --output "$OUT/tp_collectives.json"
            part tp_tokens 150 python3 benchmarks/gpu_tp.py --part tokens --output "$OUT/tp_tokens.json"
            part tp_tokens_fp8 150 python3 benchmarks/gpu_tp.py --part tokens --quant fp8 --output "$OUT/tp_tokens_fp8.json"
            part tp_kill 80 python3 benchmarks/gpu_tp.py --part kill --output "$OUT/tp_kill.json"
            part tp_speed 280 python3 benchmarks/gpu_tp.py --part speed --output "$OUT/tp_speed.json"
            ;;
        variants) part variants 200 python3 benchmarks/gpu_variants.py --output "$OUT/variants.json" ;;
        kernels) part kernels 200 python3 benchmarks/gpu_kernels.py linear gated decode ;;
        power) part power 90 python3 benchmarks/gpu_power.py --output "$OUT/power.json" ;;
        fp8)
            files=(tests/worker/test_cuda_fp8.py tests/kernels/test_fp8_triton.py)
            part fp8_tests 100 "${tests[@]}" --timeout 90 -m gpu -k "not True and not flashinfer" "${files[@]}"
            part fp8_step8b 180 python3 benchmarks/gpu_step.py --shape 8b --quant fp8 --quant none \
                --output "$OUT/fp8_step8b.json"
            part fp8_kv_step8b 120 python3 benchmarks/gpu_step.py --shape 8b --quant fp8 --kv fp8 \
                --output "$OUT/fp8_kv_step8b.json"
            part fp8_flashinfer 150 "${tests[@]}" --timeout 140 -m gpu -k "True or flashinfer" "${files[@]}"
            part fp8_kernels 100 python3 benchmarks/gpu_fp8_kernels.py
            ;;
        *) echo "no part $name: setup, attention, tests, older, model, serve, steps, variants, kernels, power, fp8, tp" ;;
        esac
    done
done
