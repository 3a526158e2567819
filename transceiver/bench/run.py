"""`trtllm-serve kv-bench`: how fast KV blocks move between two processes, beside what their link does at best.

This process is the reader and starts the owner (owner.py). Blocks are scrambled on both sides, anew for every
fetch. In every round a few fetches follow one another, then as many plain copies of as many contiguous bytes;
the first of each, which finds everything idle, is counted apart. On GPUs both clocks are brought up before.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from diptych.errors import ConfigError, StartupError
from diptych.kv_layout import KvLayout
from diptych.transceiver.bench.burn import burn
from diptych.transceiver.bench.cases import Case, Suite
from diptych.transceiver.bench.engine import Engine, read, settings_of, word_at
from diptych.transceiver.bench.links import PlainCopy, PlainSocket, memcpy, peer_copy
from diptych.transceiver.host_region import HostRegion
from diptych.transceiver.owners import choose_parts
from diptych.transceiver.plan import CopyPlan, plan_copy
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.settings import FetchDone

BURN_S = 0.03
BURST = 4
_CHECKED_BYTES = 64 << 20
_STREAMS = ("tcp", "ucx")  # compared with a plain socket; the others with a plain copy within the host


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the fetches of one case; those that say `first` over the first of each round."""

    transport: str
    case: str
    tokens: int
    digest: bool
    programs: int
    bytes: int
    wire_ms: float  # the copy, from its first instruction to the last byte's arrival
    total_ms: float  # from the call of `fetch` to its event
    offer_ms: float  # making the ticket, digests included
    plain_ms: float  # the link's plain copy of as many bytes
    first_wire_ms: float
    first_plain_ms: float
    wire_gb_s: float
    plain_gb_s: float
    fraction: float  # wire / plain
    checked: bool  # compared byte for byte; else by digests alone


class Owner:
    """The other process, driven line by line."""

    def __init__(self, suite: Suite, device: str, gpu: str) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if device == "cuda" else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "diptych.transceiver.bench.owner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        layouts = {name: msgspec.to_builtins(ranks) for name, ranks in suite.layouts.items()}
        num_blocks = {name: suite.num_blocks(ranks[0]) for name, ranks in suite.layouts.items()}
        self.port: int = self.ask(layouts=layouts, num_blocks=num_blocks, device=device)["port"]

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise StartupError("the owner's process of kv-bench has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Bench:
    suite: Suite
    device: str
    owner: Owner
    readers: dict[str, Engine] = field(default_factory=dict)
    plain: dict[str, PlainCopy] = field(default_factory=dict)  # by transport and reader
    sockets: list[PlainSocket] = field(default_factory=list)

    def open(self) -> None:
        for name in sorted({case.reader for case in self.suite.cases}):
            layout = self.suite.layouts[name][0]
            self.readers[name] = Engine(layout, self.suite.num_blocks(layout), f"reader {name}", self.device)
        self.sockets.append(PlainSocket(self.owner.port))
        for case in self.suite.cases:
            key = f"{case.transport} {case.reader}"
            if key not in self.plain:
                self.plain[key] = self.sockets[0] if case.transport in _STREAMS else self._within_host(case)

    def _within_host(self, case: Case) -> PlainCopy:
        region = HostRegion.decode(bytes.fromhex(self.owner.ask(region=case.owner)["region"]))
        memory = self.readers[case.reader].memory
        return memcpy(region, memory) if isinstance(memory, PoolMemory) else peer_copy(region, memory)

    def measure(self, case: Case, rounds: int) -> Row:
        reader = self.readers[case.reader]
        times: dict[str, list[float]] = {}
        checked = False
        rng = np.random.default_rng(case.tokens)
        for number in range(-1, rounds):  # the first one warms up
            lists = [
                (
                    self._scrambled(rng, self.suite.layouts[case.owner][0], case.tokens),
                    self._scrambled(rng, reader.layout, case.tokens),
                )
                for _ in range(BURST)
            ]
            done = self._fetch(case, reader, lists, times if number >= 0 else {})
            if number < 0:
                checked = done.bytes <= _CHECKED_BYTES
                if checked:
                    self._check(case, reader, *lists[-1])
            else:
                self._copy_plainly(f"{case.transport} {case.reader}", done.bytes, times)
        median = {name: statistics.median(values) for name, values in times.items()}
        return Row(
            transport=case.transport,
            case=case.name,
            tokens=case.tokens,
            digest=case.digest,
            programs=case.programs,
            bytes=done.bytes,
            wire_ms=round(median["wire"] * 1e3, 4),
            total_ms=round(median["total"] * 1e3, 4),
            offer_ms=round(median["first offer"] * 1e3, 4),
            plain_ms=round(median["plain"] * 1e3, 4),
            first_wire_ms=round(median["first wire"] * 1e3, 4),
            first_plain_ms=round(median["first plain"] * 1e3, 4),
            wire_gb_s=round(done.bytes / median["wire"] / 1e9, 2),
            plain_gb_s=round(done.bytes / median["plain"] / 1e9, 2),
            fraction=round(median["plain"] / median["wire"], 3),
            checked=checked,
        )

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()
        for sock in self.sockets:
            sock.close()
        self.owner.close()

    def _fetch(
        self,
        case: Case,
        reader: Engine,
        lists: list[tuple[list[int], list[int]]],
        times: dict[str, list[float]],
    ) -> FetchDone:
        self.owner.ask(reuse=case.owner)
        offers = [
            self.owner.ask(
                offer=case.owner,
                blocks=source,
                tokens=case.tokens,
                transport=case.transport,
                digest=case.digest,
                programs=case.programs,
            )
            for source, _ in lists
        ]
        settings = settings_of(case.transport, digest=case.digest, programs=case.programs)
        self._bring_up_clocks()
        fetched = [
            reader.fetch(settings, bytes.fromhex(offer["ticket"]), blocks)
            for offer, (_, blocks) in zip(offers, lists, strict=True)
        ]
        _note(times, "wire", [done.wire_s for done in fetched])
        _note(times, "total", [done.total_s for done in fetched])
        _note(times, "offer", [offer["offer_s"] for offer in offers])
        return fetched[-1]

    def _copy_plainly(self, link: str, num_bytes: int, times: dict[str, list[float]]) -> None:
        self._bring_up_clocks()
        _note(times, "plain", [self.plain[link](num_bytes) for _ in range(BURST)])

    def _bring_up_clocks(self) -> None:
        if self.device == "cuda":
            self.owner.ask(burn=BURN_S)
            burn(BURN_S)

    def _scrambled(self, rng: np.random.Generator, layout: KvLayout, tokens: int) -> list[int]:
        count = -(-tokens // layout.tokens_per_block)
        picked: list[int] = rng.permutation(self.suite.num_blocks(layout))[:count].tolist()
        return picked

    def _check(self, case: Case, reader: Engine, source: list[int], blocks: list[int]) -> None:
        for plan in self._plans(case, reader.layout, source, blocks):
            spans = plan.spans()
            for start, end, length in zip(
                spans.source_offset.tolist(),
                spans.destination_offset.tolist(),
                spans.length.tolist(),
                strict=True,
            ):
                expected = word_at(np.arange(start // 8, (start + length) // 8)).view(np.uint8)
                if not np.array_equal(read(reader.memory, end, length), expected):
                    raise RuntimeError(f"{case.transport}, {case.name}: wrong bytes")

    def _plans(self, case: Case, layout: KvLayout, source: list[int], blocks: list[int]) -> list[CopyPlan]:
        ranks = self.suite.layouts[case.owner]
        if ranks == [layout]:
            return [plan_copy(layout, layout, source, range(len(blocks)), blocks, num_tokens=case.tokens)]
        return [
            plan_copy(
                ranks[part.owner],
                layout,
                source,
                range(len(blocks)),
                blocks,
                num_tokens=case.tokens,
                part=part,
            )
            for part in choose_parts(ranks, layout)
        ]


def _note(times: dict[str, list[float]], name: str, burst: list[float]) -> None:
    times.setdefault(f"first {name}", []).append(burst[0])
    times.setdefault(name, []).extend(burst[1:])


def prepare(suite: Suite, device: str) -> Bench:
    gpus = _gpus() if device == "cuda" else ["", ""]
    if device == "cuda":  # before torch looks
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[1]
    bench = Bench(suite, device, Owner(suite, device, gpus[0]))
    try:
        bench.open()
    except BaseException:
        bench.close()
        raise
    return bench


def _gpus() -> list[str]:
    """The owner's and the reader's GPU; the same one when there is only one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        visible = ",".join(listed.stdout.split())
    found = [name for name in visible.split(",") if name]
    if not found:
        raise ConfigError("--device is cuda, but this machine shows no GPU")
    return [found[0], found[1] if len(found) > 1 else found[0]]
