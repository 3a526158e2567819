"""An engine without a model in a process of its own: JSON lines in, JSON lines out. Run by Process."""

import json
import os
import select
import sys
import time

from kv_nodes import LAYOUTS, after, fill, landings, make_pool

from diptych.transceiver.settings import LeaseEnded, TransceiverSettings
from diptych.transceiver.transceiver import Transceiver


def main(layout_name: str, num_blocks: str, seed: str, settings: str) -> None:
    layout = LAYOUTS[layout_name]
    options = json.loads(settings)
    memory = make_pool(layout, int(num_blocks), f"process-{os.getpid()}", options.pop("device", "cpu"))
    fill(memory, int(seed))
    bell = os.eventfd(0)
    options["backends"] = tuple(options["backends"])
    transceiver = Transceiver(
        memory, layout, TransceiverSettings(**options), wake=lambda: os.eventfd_write(bell, 1)
    )
    while True:
        ready, _, _ = select.select([sys.stdin, bell], [], [])
        if bell in ready:
            os.eventfd_read(bell)
            for event in transceiver.poll(time.monotonic()):
                if isinstance(event, LeaseEnded):
                    say(ended=event.ticket_id, reason=event.reason)
                else:
                    say(fetched=type(event).__name__)
        if sys.stdin in ready:
            command = json.loads(sys.stdin.readline())
            if "offer" in command:
                blocks = command["offer"]
                ticket_id, ticket = transceiver.offer(blocks, len(blocks) * layout.tokens_per_block)
                say(ticket=ticket.hex(), ticket_id=ticket_id)
            elif "fetch" in command:
                hold_after_first_piece()
                transceiver.fetch(bytes.fromhex(command["fetch"]), command["indices"], command["blocks"])


def hold_after_first_piece() -> None:
    def hold() -> None:
        say(halfway=True)
        time.sleep(60)  # to be killed in

    for owner, name in landings():
        setattr(owner, name, after(getattr(owner, name), hold))


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
