"""Journal lines: what is written is what is read, however the tokens fall into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.journal import END, ChoiceSoFar, Entry, JournalError, journal_line, read_journal

ENTRIES = st.builds(
    Entry,
    index=st.integers(0, 3),
    token_ids=st.lists(st.integers(0, 200_000), max_size=4),
    cached_tokens=st.none() | st.integers(0, 10_000),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    stop_token_id=st.none(),
)


@given(st.lists(st.lists(ENTRIES, max_size=4)))
def test_lines_add_up(lines):
    stream = read_journal(b"".join(journal_line(entries) for entries in lines))
    assert not stream.ended
    written = [entry for entries in lines for entry in entries]
    assert set(stream.choices) == {entry.index for entry in written}
    for index, choice in stream.choices.items():
        own = [entry for entry in written if entry.index == index]
        assert choice.token_ids == [token_id for entry in own for token_id in entry.token_ids]
        cached = [entry.cached_tokens for entry in own if entry.cached_tokens is not None]
        assert choice.cached_tokens == (cached[-1] if cached else None)


def test_the_format_of_the_protocol():
    line = journal_line([Entry(0, [5, 7], cached_tokens=32), Entry(1, [9], None, "stop", 2), Entry(2)])
    assert line == b": 0=5,7@32;1=9!stop/2;2=\n"
    stream = read_journal(line + END)
    assert stream.ended
    assert stream.choices == {
        0: ChoiceSoFar([5, 7], 32),
        1: ChoiceSoFar([9], None, "stop", 2),
        2: ChoiceSoFar(),
    }


@pytest.mark.parametrize(
    "line", [b"0=1\n", b": 0\n", b": a=1\n", b": 0=1,x\n", b": 0=1@z\n", b"data: {}\n", b"\xff\n"]
)
def test_nonsense_is_refused(line):
    with pytest.raises(JournalError):
        read_journal(line)
