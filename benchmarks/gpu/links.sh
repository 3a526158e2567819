#!/bin/bash
# Transports between GPUs of one host: their conformance suite, the doctor's view, their speed beside a plain peer copy.
# .whl/ may hold wheels, and an archive with the packages of nixl and ucx, for a machine without a package index.
# Each part has a time limit and goes on where the one before it failed: benchmarks/gpu/links.sh [part ...]
set -u
site=${TMPDIR:-/tmp}/site
mkdir -p "$site" "${OUT:=results}"
export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1 OUT
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi
for archive in .whl/*.tar.xz; do
    [ -e "$archive" ] && tar xf "$archive" -C "$site"
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
nvidia-smi topo -m | head -8

part() { # name, seconds, lines to show, command...
    local name=$1 limit=$2 lines=$3 started=$SECONDS
    shift 3
    timeout "$limit" "$@" >"${TMPDIR:-/tmp}/$name.txt" 2>&1
    echo "== $name: exit $? after $((SECONDS - started)) s"
    tail -n "$lines" "${TMPDIR:-/tmp}/$name.txt" | cut -c1-300
}

bench() { # limit, file, transports and options...
    local limit=$1 output=$2
    shift 2
    part "bench_$output" "$limit" 60 python3 -m diptych.cli kv_bench "$@" --output "$OUT/$output.json"
}

doctor() {
    python3 -m diptych.cli doctor --listen 9017 &
    local listener=$!
    python3 -m diptych.cli doctor --peer 127.0.0.1:9017
    kill "$listener"
}
export -f doctor

for name in ${*:-suite bench doctor links}; do
    case $name in
    suite) part suite 110 40 python3 -m pytest tests/transceiver tests/kernels/test_block_copy.py -q \
        -p no:cacheprovider -p no:benchmark --tb=short --durations=5 -n 12 -m "gpu or gpu2" ;;
    bench) bench 90 kv_bench_h200x2 --transport cuda_ipc -n 256 -n 2048 -n 8192 --rounds 7 ;;
    doctor) part doctor 60 60 bash -c doctor ;;
    links) bench 70 kv_bench_h200x2_links --transport nixl --transport tcp --transport ucx \
        --per_layer -n 256 -n 2048 --rounds 3 ;;
    *) echo "no part is called $name" >&2; exit 2 ;;
    esac
done
