"""`stream_interval`: the deltas of several steps as one chunk of a stream.

A choice is due at its first token, then whenever its number of tokens passes a multiple of the interval, and at
its end. What is due takes the other choices' held deltas along: a journal line stands for all that was sent.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from diptych.text import ChoiceText, Delta


class HasText(Protocol):
    index: int
    text: ChoiceText


C = TypeVar("C", bound=HasText)


class StreamInterval(Generic[C]):
    def __init__(self, every: int) -> None:
        """`every`: tokens."""
        self._every = every
        self._held: dict[int, tuple[C, list[Delta]]] = {}

    def add(self, batch: list[tuple[C, Delta]]) -> list[tuple[C, Delta]]:
        """What is to be sent now, one delta a choice; nothing while it is too early."""
        if self._every == 1:
            return batch
        for choice, delta in batch:
            self._held.setdefault(choice.index, (choice, []))[1].append(delta)
        if not any(self._is_due(choice, delta) for choice, delta in batch):
            return []
        held, self._held = self._held, {}
        return [(choice, joined(deltas)) for choice, deltas in held.values()]

    def _is_due(self, choice: C, delta: Delta) -> bool:
        after = len(choice.text.token_ids)
        before = after - len(delta.token_ids)
        return delta.finish_reason is not None or not before or before // self._every != after // self._every


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one choice, in their order, as one."""
    last = deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Delta(
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        last.finish_reason,
        last.stop_reason,
        logprobs or last.logprobs,
    )
