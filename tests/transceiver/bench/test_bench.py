"""kv-bench measures what it says, checks the bytes, and writes down where and when."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from diptych.cli import main
from diptych.errors import ConfigError
from diptych.transceiver.bench import engine
from diptych.transceiver.bench.cases import suite
from diptych.transceiver.bench.command import BenchSettings, run


def test_every_way_is_measured_and_written_down(tmp_path: Path, capsys):
    output = tmp_path / "figures" / "kv.json"
    transports = ("shm", "tcp")
    run(
        BenchSettings(
            device="cpu", shape="135m", tokens=(64, 40), transports=transports, rounds=1, output=output
        )
    )

    report = json.loads(output.read_text())
    rows = report["rows"]
    assert [(row["transport"], row["tokens"], row["digest"]) for row in rows] == [
        (transport, tokens, digest)
        for transport in transports
        for tokens in (40, 64)
        for digest in (True, False)
    ]
    for row in rows:
        assert row["checked"]
        assert row["bytes"] == 2 * 30 * 2 * 3 * 32 * 64 * 2  # two blocks, also for 40 tokens
        assert 0 < row["wire_ms"] <= row["total_ms"]
        assert row["fraction"] == pytest.approx(row["plain_ms"] / row["wire_ms"], abs=0.01)
    assert report["where"]["python"]
    assert report["date"].endswith("+00:00")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(rows)


def test_wrong_bytes_are_noticed(monkeypatch):
    monkeypatch.setattr("diptych.transceiver.bench.run.word_at", lambda index: index.astype(np.uint64))
    with pytest.raises(RuntimeError, match="shm, scrambled: wrong bytes"):
        run(BenchSettings(device="cpu", shape="135m", tokens=(32,), transports=("shm",), rounds=1))


def test_gpus_also_cut_blocks_and_bound_the_programs():
    planned = suite("8b", (256, 2048), ("cuda_ipc", "tcp"), on_gpu=True)
    names = {(case.transport, case.name) for case in planned.cases}
    assert {("cuda_ipc", "TP2 to TP1"), ("cuda_ipc", "16 programs"), ("tcp", "scrambled")} <= names
    assert ("tcp", "TP2 to TP1") not in names
    assert {case.tokens for case in planned.cases if case.name == "16 programs"} == {2048}
    assert [layout.kv_heads for layout in planned.layouts["TP2"]] == [range(4), range(4, 8)]
    assert planned.num_blocks(planned.layouts["TP1"][0]) * 32 >= 2048 * 1.25
    odd = suite("135m", (256,), ("cuda_ipc",), on_gpu=True)
    assert "TP2" not in odd.layouts  # three heads have no halves


def test_a_pool_by_layers_moves_as_many_bytes_in_more_pieces():
    planned = suite("135m", (64, 256), ("shm",), on_gpu=False, per_layer=True)
    (small, large) = [case for case in planned.cases if case.name == "layer by layer"]
    (whole,), (layer,) = planned.layouts["TP1"], planned.layouts["layers"]
    assert (small.tokens, large.tokens) == (64 * 30, 256 * 30)
    assert large.tokens // 32 * layer.block_bytes == 256 // 32 * whole.block_bytes
    assert planned.num_blocks(layer) == 30 * planned.num_blocks(whole)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"transports": ("cuda_ipc",)},
            "--transport is cuda_ipc, allowed with device cpu are shm, tcp, nixl, ucx",
        ),
        ({"shape": "405b"}, "--shape is '405b', allowed are 8b, 135m"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run(BenchSettings(device="cpu", **settings))


def test_a_fetch_that_fails_ends_the_run(monkeypatch):
    layout = suite("135m", (32,), ("shm",), on_gpu=False).layouts["TP1"][0]
    node = engine.Engine(layout, 4, "bench", "cpu")
    settings = engine.settings_of("shm", digest=True, programs=1)
    ticket = node.offer(settings, [1], 32)
    node.reuse_all()
    with pytest.raises(RuntimeError, match="stale"):
        node.fetch(settings, ticket, [2])
    node.close()


def test_the_command_takes_both_spellings():
    for name in ("kv-bench", "kv_bench"):
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0
        assert "--transport" in shown.output
