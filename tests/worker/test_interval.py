"""`stream_interval`: how often a choice is due, and that nothing is lost meanwhile."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from diptych.text import Delta
from diptych.text.choice import TokenLogprob
from diptych.worker.interval import StreamInterval, joined


@dataclass
class Choice:
    index: int = 0
    text: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(token_ids=[]))

    def draw(self, *token_ids: int, end: str | None = None) -> tuple["Choice", Delta]:
        self.text.token_ids += token_ids
        return self, Delta("x" * len(token_ids), token_ids, end)


def sizes(every: int, num_tokens: int) -> list[int]:
    interval, choice, found = StreamInterval(every), Choice(), []
    for i in range(1, num_tokens + 1):
        sent = interval.add([choice.draw(i, end="length" if i == num_tokens else None)])
        found += [len(delta.token_ids) for _, delta in sent]
    return found


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1] * 10), (2, [1, 1, 2, 2, 2, 2]), (4, [1, 3, 4, 2]), (100, [1, 9])]
)
def test_the_first_token_comes_at_once_then_every_so_many_and_the_end(every, expected):
    assert sizes(every, 10) == expected


def test_several_tokens_of_one_step_may_pass_a_multiple():
    interval, choice = StreamInterval(4), Choice()
    assert interval.add([choice.draw(1)])
    assert interval.add([choice.draw(2, 3)]) == []
    [(_, delta)] = interval.add([choice.draw(4, 5, 6)])
    assert list(delta.token_ids) == [2, 3, 4, 5, 6]
    assert delta.text == "xxxxx"


def test_what_is_due_takes_the_others_along():
    interval, a, b = StreamInterval(4), Choice(0), Choice(1)
    interval.add([a.draw(1), b.draw(1)])
    assert interval.add([a.draw(2)]) == []
    sent = interval.add([b.draw(2, end="stop")])
    assert [(choice.index, list(delta.token_ids), delta.finish_reason) for choice, delta in sent] == [
        (0, [2], None),
        (1, [2], "stop"),
    ]


def test_deltas_join():
    entry = TokenLogprob(b"a", -1.0, (), 0)
    parts = [Delta("a", [1], logprobs=[entry]), Delta("b", [2], logprobs=[entry]), Delta("", [], "stop", 7)]
    assert joined(parts) == Delta("ab", [1, 2], "stop", 7, [entry, entry])
    assert joined([Delta("a", [1]), Delta("b", [2])]) == Delta("ab", [1, 2])
