"""The doctor on this host, as a user starts it, and beside a peer."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from diptych.cli import main
from diptych.transceiver import packages
from diptych.transceiver.doctor import command, listen, versions
from diptych.transceiver.doctor.finding import Finding, can_serve, table
from diptych.trust import ClusterTrust

PATIENCE_S = 200


def doctor(*arguments: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "diptych.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def speeds(report: dict, section: str) -> dict[str, float | None]:
    return {line["name"]: line["gb_s"] for line in report["findings"] if line["section"] == section}


@pytest.fixture(scope="module")
def listening() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-m", "diptych.cli", "doctor", "--listen", "0", "--host", "127.0.0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        line = process.stdout.readline()
        yield int(line.partition("127.0.0.1:")[2].split()[0])
        process.terminate()


def test_this_host_and_a_peer_are_measured(listening):
    code, report = doctor("--peer", f"127.0.0.1:{listening}")
    assert code == 0, report
    assert report["can_serve"]
    for section in ("links here", "links to peer"):
        found = speeds(report, section)
        assert found["shm"] > 0
        assert found["tcp"] > 0


def test_what_is_not_installed_says_what_to_install():
    _, report = doctor()
    lines = {line["name"]: line for line in report["findings"] if line["section"] == "links here"}
    for name in packages.OPTIONAL:
        if remedy := packages.missing_package(name):
            assert lines[name]["status"] == "none"
            assert lines[name]["remedy"] == remedy


def test_a_peer_that_is_not_there_fails(monkeypatch):
    monkeypatch.setattr(command, "_PEER_S", 0.1)
    findings = list(command._peer("127.0.0.1:1"))
    [line] = findings
    assert line.status == "fails"
    assert "refused" in line.detail


def test_a_router_only_install_cannot_serve(monkeypatch, capsys):
    monkeypatch.setattr(versions, "_version", lambda name: None)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.run(command.DoctorSettings()) == 1
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "pip install 'diptych[worker]'" in shown
    assert "not measured: needs xxhash" in shown
    assert shown.splitlines()[-1] == "Not as it is: see what fails."


def test_an_etcd_that_does_not_answer_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_local_ways", lambda: contextlib.nullcontext([]))
    monkeypatch.setattr(command, "_ASK_S", 0.5)
    file = tmp_path / "metadata_config.yaml"
    file.write_text("server_type: etcd\nhostname: 127.0.0.1\nport: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "-m", str(file)], standalone_mode=False)
    assert ended.value.code == 1
    assert "http://127.0.0.1:1" in capsys.readouterr().out


def test_the_table_shows_each_section_once():
    findings = [
        Finding(section="links here", name="shm", detail="9.0 GB/s"),
        Finding(section="links here", name="nixl", status="none", detail="not installed", remedy="pip"),
        Finding(section="etcd", name="e", status="fails", detail="gone"),
    ]
    assert table(findings).splitlines() == [
        "links here  shm   ok     9.0 GB/s",
        "            nixl  -      not installed: pip",
        "etcd        e     fails  gone",
    ]
    assert not can_serve(findings)
    assert can_serve(findings[:2])


def test_a_listening_doctor_asks_for_the_clusters_secret():
    trust = ClusterTrust("hush")
    assert listen._response(listen.PATH, {}, trust, b"peer")[0] == 403
    assert listen._response(listen.PATH, trust.headers(), trust, b"peer") == (200, b"peer")
    assert listen._response("/", trust.headers(), trust, b"peer")[0] == 404
