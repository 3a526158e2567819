#!/bin/bash
# The nixl and ucx transports between GPUs of one host: their conformance suite, then their speed beside cuda_ipc.
# .whl/ may hold wheels, and an archive with the packages of nixl and ucx, for a machine without a package index.
set -u
site=${TMPDIR:-/tmp}/site
mkdir -p "$site" "${OUT:=results}"
export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi
for archive in .whl/*.tar.xz; do
    [ -e "$archive" ] && tar xf "$archive" -C "$site"
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
nvidia-smi topo -m | head -8

part() { # name, seconds, command...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1
    echo "== $name: exit $? after $((SECONDS - started)) s"
    tail -n 40 "$OUT/$name.txt" | cut -c1-300
}

part suite 200 python3 -m pytest tests/transceiver/test_conformance.py -q -p no:cacheprovider -p no:benchmark \
    --tb=short --maxfail=8 --durations=5 -n 6 -k "GPU and (nixl or ucx)"
part bench 200 python3 -m diptych.cli kv_bench --transport cuda_ipc --transport nixl --transport ucx --transport tcp \
    --per_layer -n 256 -n 2048 -n 8192 --rounds 5 --output "$OUT/kv_bench_h200x2_links.json"
part protocols 60 env UCX_PROTO_INFO=y python3 -m diptych.cli kv_bench --transport nixl --per_layer -n 256 --rounds 1
