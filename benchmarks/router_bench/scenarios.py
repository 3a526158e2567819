"""What is asked of each router."""

from dataclasses import dataclass

_PACED_RATE = 500  # requests/s of all connections together: a load that none of the routers is busy with


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    mode: str  # json or stream
    concurrency: int
    seconds: float
    max_tokens: int = 64
    tick_us: int = 0  # of the generation worker: time between two tokens of a stream
    prompt_bytes: int = 200
    pause_us: int = 0  # mean time between an answer and the connection's next request

    def arguments(self, port: int) -> list[str]:
        """Of load_client.c."""
        warmup_s = 0.5
        numbers = (self.max_tokens, self.prompt_bytes, self.pause_us)
        head = (port, self.concurrency, self.seconds, warmup_s, self.mode)
        return [str(value) for value in (*head, *numbers)]


SCENARIOS = (
    # As fast as it goes: throughput and CPU time of one request; latency is the length of the queue.
    *(Scenario(f"json c{n}", "json", n, 1.5) for n in (1, 64, 256, 1024)),
    Scenario("json c64 32KB", "json", 64, 1.5, prompt_bytes=32768),
    Scenario("burst c64", "stream", 64, 1.5),
    # At a steady rate: what the router adds to the latency of one request.
    *(
        Scenario(f"paced c{n}", "json", n, 1.5, pause_us=n * 1_000_000 // _PACED_RATE)
        for n in (1, 64, 256, 1024)
    ),
    # Tokens at the speed at which people get them: CPU time and delay of one event.
    *(Scenario(f"stream c{n}", "stream", n, 2.0, max_tokens=128, tick_us=20_000) for n in (1, 64, 256)),
    Scenario("stream c1024", "stream", 1024, 2.0, max_tokens=64, tick_us=100_000),
)
