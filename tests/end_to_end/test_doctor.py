"""The doctor beside running workers, and what a worker says of limits that hold it back."""

import json
import subprocess
import sys

from mesh import MODEL, mesh, wait_for

from tests.fakes.ports import free_port

PATIENCE_S = 200


def doctor(*arguments):
    """What it finds; all of it must be well."""
    command = [sys.executable, "-m", "diptych.cli", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)["findings"]


def test_the_way_to_a_running_worker_is_measured(servers):
    lines = doctor("--peer", f"127.0.0.1:{servers['context'].port}")
    found = {line["name"]: line["gb_s"] for line in lines if line["section"] == "links to peer"}
    assert found["shm"] > 0
    assert found["tcp"] > 0


def test_an_etcd_that_answers(tmp_path):
    with mesh(tmp_path) as started:
        etcd = started.etcd()
        [line] = [line for line in doctor("-m", str(started.metadata(etcd))) if line["section"] == "etcd"]
    assert line["detail"] == "0 workers are registered"


def test_a_worker_warns_of_limits_that_hold_it_back(small_model, tmp_path):
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "diptych.cli", "serve", MODEL, "--port", str(free_port())]
    with log.open("wb") as output:
        limited = ["bash", "-c", 'ulimit -S -n 512; exec "$@"', "-", *command]
        process = subprocess.Popen(limited, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for("the warning", lambda: "512 open files are allowed" in log.read_text(), PATIENCE_S)
    finally:
        process.terminate()
        process.wait(30)
    [line] = [line for line in log.read_text().splitlines() if "512 open files" in line]
    assert " W " in line
    assert "ulimit -n" in line
