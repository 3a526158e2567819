from hypothesis import example, given
from hypothesis import strategies as st

from diptych.text import StopStrings


def reference(text: str, stops: list[str], *, include_stop: bool) -> tuple[str, str | None]:
    """Character by character: the first end of any stop string, the longest of those ending there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def feed_all(stops: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    out = ""
    for piece in pieces:
        safe, matched = stops.feed(piece)
        out += safe
        if matched is not None:
            return out, matched
    return out + stops.flush(), None


ab = st.text("ab", max_size=24)


@given(
    ab,
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(1, 4)),
    st.booleans(),
)
@example("abab", ["ab", "bab"], [1], False)
@example("aab", ["aab", "ab", "b"], [2], False)
def test_cuts_never_matter(text: str, stops: list[str], sizes: list[int], include_stop: bool):
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    pieces.append(text[at:])
    found = feed_all(StopStrings(stops, include_stop=include_stop), pieces)
    assert found == reference(text, stops, include_stop=include_stop)


@given(ab, st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_what_is_held_could_become_a_stop_and_no_more(text: str, stops: list[str]):
    if any(stop in text for stop in stops):
        return
    safe, matched = StopStrings(stops).feed(text)
    assert matched is None
    held = text[len(safe) :]
    longest = max(
        (k for k in range(len(text) + 1) for stop in stops if k < len(stop) and text.endswith(stop[:k])),
        default=0,
    )
    assert len(held) == longest


def test_without_stops_all_text_passes():
    stops = StopStrings([])
    assert stops.feed("anything") == ("anything", None)
    assert stops.flush() == ""


def test_flush_gives_the_held_text_once():
    stops = StopStrings(["###"])
    assert stops.feed("a##") == ("a", None)
    assert stops.flush() == "##"
    assert stops.flush() == ""
