"""What nvidia-smi prints, read; on machines that have none."""

import pytest

from diptych.transceiver.doctor import gpus

LISTED = "0, NVIDIA H200, 143771 MiB, 570.1\n1, NVIDIA H200, 143771 MiB, 570.1"
TOPOLOGY = "\n".join(
    [
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m",
        "GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0",
        "GPU1\tNV18\t X \tPHB\tSYS\t0-31\t0",
        "GPU2\tSYS\tPHB\t X \tSYS\t0-31\t1",
        "NIC0\tPIX\tSYS\tSYS\t X",
    ]
)
READS = (
    " \tGPU0\tGPU1\tGPU2\n GPU0\tX\tOK\tNS\n GPU1\tOK\tX\tOK\n GPU2\tNS\tOK\tX\n\nLegend:\n  OK  = Status Ok"
)


@pytest.fixture
def machine(monkeypatch):
    """A machine with a driver, whose nvidia-smi answers so."""
    answers = {"--query-gpu=index,name,memory.total,driver_version": LISTED, "-m": TOPOLOGY, "r": READS}
    monkeypatch.setattr(gpus, "has_driver", lambda: True)
    monkeypatch.setattr(gpus, "_ask", lambda *words: next((answers[w] for w in words if w in answers), ""))
    return answers


def test_tables_of_pairs():
    assert gpus.matrix(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "PHB"}
    assert gpus.matrix(READS) == {(0, 1): "OK", (0, 2): "NS", (1, 2): "OK"}
    assert gpus.matrix("") == {}


def test_gpus_and_their_links(machine):
    found = {finding.name: finding for finding in gpus.gpus()}
    assert found["GPU0"].detail == "NVIDIA H200, 143771 MiB, 570.1"
    assert (found["GPU0-1"].status, found["GPU0-1"].detail) == ("ok", "NV18, peer access OK")
    assert found["GPU0-2"].status == "warns"
    assert "no peer access (NS)" in found["GPU0-2"].detail
    assert found["GPU0-2"].remedy


def test_a_driver_without_gpus_fails(machine):
    machine.clear()
    [finding] = gpus.gpus()
    assert finding.status == "fails"
    assert "--gpus all" in finding.remedy


def test_no_driver_is_no_failure(monkeypatch):
    monkeypatch.setattr(gpus, "has_driver", lambda: False)
    [finding] = gpus.gpus()
    assert (finding.status, finding.section) == ("none", "GPUs")
