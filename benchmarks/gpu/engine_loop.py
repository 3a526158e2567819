"""The worker's step loop without its processes: requests go in, events are encoded as for the HTTP side and dropped."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from diptych.transceiver.metrics import TransceiverMetrics
from diptych.transceiver.settings import FetchDone
from diptych.wire import EngineOutput, FromEngine, SamplingParams, Submit, ToEngine
from diptych.worker.blocks import BlockPool
from diptych.worker.engine import Engine
from diptych.worker.link import encode
from diptych.worker.plan import SchedulerLimits
from diptych.worker.scheduler import Scheduler


@dataclass
class Inbox:
    """A link whose other end keeps the time of every step that brought tokens."""

    messages: list[ToEngine] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def receive(self, timeout_s: float) -> Iterator[ToEngine]:
        messages, self.messages = self.messages, []
        yield from messages

    def send(self, message: FromEngine) -> None:
        encode(message)
        if isinstance(message, EngineOutput) and message.events:
            self.times.append(time.perf_counter())
            self.num_tokens += sum(len(event.token_ids) for event in message.events)


class InstantTransceiver:
    """Every fetch is done at once: a sequence starts with its prompt's KV, whatever that holds."""

    def __init__(self) -> None:
        self._done: list[FetchDone] = []

    def poll(self, now: float) -> list[FetchDone]:
        done, self._done = self._done, []
        return done

    def fetch(self, ticket: bytes, source_indices: range, destination_blocks: list[int]) -> int:
        fetch_id = int(ticket)
        self._done.append(FetchDone(fetch_id, 0, 0.0, 0.0, "none", told=True))
        return fetch_id

    def metrics(self) -> TransceiverMetrics:
        return TransceiverMetrics()

    def close(self) -> None:
        pass


def decode_step_ms(
    runner: Any,
    num_blocks: int,
    block: int,
    rows: int,
    context: int,
    *,
    overlap: bool,
    steps: int,
    temperature: float = 0.0,
) -> list[float]:
    """Milliseconds between the outputs of consecutive steps of `rows` sequences."""
    inbox, engine = _engine(runner, num_blocks, block, rows, 8192, overlap=overlap)
    for row in range(rows):
        inbox.messages.append(
            Submit(
                request_id=f"sequence-{row}",
                prompt_token_ids=torch.randint(0, 40000, (context,)).tolist(),
                params=SamplingParams(
                    max_tokens=steps + 20, temperature=temperature, ignore_eos=True, seed=row
                ),
                request_type="generation_only",
                output_token_ids=[row],
                ticket=str(row).encode(),
            )
        )
    while len(inbox.times) < steps + 10:
        _turn(engine, inbox)
    return [(after - before) * 1e3 for before, after in zip(inbox.times[9:], inbox.times[10:], strict=False)]


def prefill_tokens_per_s(runner: Any, num_blocks: int, block: int, rows: int, length: int) -> float:
    """Prompts of one length until each has its first token."""
    inbox, engine = _engine(runner, num_blocks, block, max(rows, 8), 8192, overlap=True)
    prompts = [torch.randint(0, 40000, (length,)).tolist() for _ in range(rows)]
    started = time.perf_counter()
    for row, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=1, temperature=0.0)
        inbox.messages.append(Submit(request_id=f"prompt-{row}", prompt_token_ids=prompt, params=params))
    while inbox.num_tokens < rows:
        _turn(engine, inbox)
    return rows * length / (time.perf_counter() - started)


def _engine(
    runner: Any, num_blocks: int, block: int, rows: int, max_num_tokens: int, *, overlap: bool
) -> tuple[Inbox, Engine[Any]]:
    limits = SchedulerLimits(
        max_batch_size=rows, max_num_tokens=max_num_tokens, max_seq_len=8192, tokens_per_block=block
    )
    inbox = Inbox()
    scheduler = Scheduler(limits, BlockPool(num_blocks, reuse=True))
    engine: Engine[Any] = Engine(inbox, scheduler, runner, InstantTransceiver(), overlap=overlap)  # type: ignore[arg-type]
    return inbox, engine


def _turn(engine: Engine[Any], inbox: Inbox) -> None:
    for message in inbox.receive(0.0):
        engine._take(message)
    engine.step()
