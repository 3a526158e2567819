"""Workers as policies see them."""

from dataclasses import dataclass


@dataclass(eq=False)
class FakeView:
    worker_id: str
    in_flight: int = 0
    elsewhere: float = 0.0


def views(count: int, **fields) -> list[FakeView]:
    return [FakeView(f"w{number}", **fields) for number in range(count)]
