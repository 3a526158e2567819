"""The doctor beside running workers, and what a worker says of limits that hold it back."""

import json
import subprocess
import sys

from mesh import MODEL, free_port, wait_for

PATIENCE_S = 200


def test_the_way_to_a_running_worker_is_measured(servers):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "diptych.cli",
            "doctor",
            "--json",
            "--peer",
            f"127.0.0.1:{servers['context'].port}",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = json.loads(done.stdout)["findings"]
    found = {line["name"]: line["gb_s"] for line in lines if line["section"] == "links to peer"}
    assert found["shm"] > 0
    assert found["tcp"] > 0


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
