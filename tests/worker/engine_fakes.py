"""An engine's surroundings as fakes: a model, a transceiver, and messages from a list; no processes, no clock."""

from collections import deque

import msgspec

from diptych.transceiver.metrics import TransceiverMetrics
from diptych.wire import SamplingParams, Submit, TokenEvent
from diptych.worker.blocks import BlockPool
from diptych.worker.engine import Engine
from diptych.worker.plan import Drawn, SchedulerLimits
from diptych.worker.scheduler import Scheduler


class Link:
    def __init__(self):
        self.inbox = deque()
        self.sent = []

    def receive(self, timeout_s):
        while self.inbox:
            yield self.inbox.popleft()

    def send(self, message):
        self.sent.append(message)

    @property
    def events(self):
        return [event for message in self.sent for event in message.events]


class Model:
    """Draws the number of tokens before."""

    def __init__(self):
        self.log = []
        self.wants_tokens = False

    def needs_tokens(self, plan):
        return self.wants_tokens

    def launch(self, plan):
        self.log.append("launch")
        return [Drawn(chunk.start + chunk.count) for chunk in plan.chunks if chunk.draws]

    def collect(self, launched):
        self.log.append("collect")
        return launched


class Transceiver:
    def __init__(self):
        self.happened = []
        self.fetches = []
        self.offers = []
        self.calls = []
        self.followers = set()
        self.notices = []

    def poll(self, now):
        events, self.happened = self.happened, []
        return events

    def offer(self, block_ids, num_tokens):
        self.offers.append((list(block_ids), num_tokens))
        return f"t{len(self.offers)}", b"ticket"

    def fetch(self, ticket, source_indices, destination_blocks):
        self.fetches.append((ticket, list(source_indices), list(destination_blocks)))
        return len(self.fetches)

    def abort(self, fetch_id):
        self.calls.append(("abort", fetch_id))

    def release(self, ticket_id):
        self.calls.append(("release", ticket_id))

    def is_followed(self, key):
        return key in self.followers

    def show_progress(self, key, content, block_ids, num_tokens):
        self.notices.append((key, content, list(block_ids), num_tokens))

    def hand_over(self, key, content, ticket, note):
        event = msgspec.msgpack.decode(note, type=TokenEvent)
        self.notices.append((key, content, ticket, event.token_ids, event.finish_reason))

    def withdraw(self, key, reason):
        self.notices.append((key, reason))

    def follow(self, owner, key):
        self.calls.append(("follow", owner, key))
        return 1

    def unfollow(self, follow_id):
        self.calls.append(("unfollow", follow_id))

    def metrics(self):
        return TransceiverMetrics()

    def close(self):
        self.calls.append("close")


def build(**options):
    link, transceiver, model = Link(), Transceiver(), Model()
    limits = SchedulerLimits(max_batch_size=4, max_num_tokens=16, max_seq_len=64, tokens_per_block=4)
    scheduler = Scheduler(limits, BlockPool(16))
    engine = Engine(link, scheduler, model, transceiver, clock=lambda: 0.0, **options)
    return (engine, link, transceiver, scheduler), model


def submit(request_id="r", prompt=(1, 2, 3, 4, 5), max_tokens=3, **fields):
    return Submit(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        **fields,
    )


def run(engine, link, *messages):
    link.inbox.extend([*messages])
    for message in link.receive(0):
        engine._take(message)
    for _ in range(10):
        if engine.step() > 0:
            return
