import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.text import IncrementalDetokenizer, Tokenizer

TEXTS = st.text(
    st.sampled_from("ab  \n.,1é日本語ǅ한국\U0001f469\u200d\U0001f467\u0301\U0001f1e9\U0001f1ea")
    | st.characters(exclude_categories=["Cs"]),
    max_size=30,
)


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip: bool, cuts: int = 1) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.feed(ids[i : i + cuts]) for i in range(0, len(ids), cuts)]
    return [*pieces, detokenizer.flush()]


@given(st.data(), st.booleans(), st.integers(1, 4))
def test_random_tokens_join_to_the_whole_decode(tiny: Tokenizer, data: st.DataObject, skip: bool, cuts: int):
    ids = data.draw(st.lists(st.integers(0, tiny.vocab_size + 1), max_size=40))
    joined = "".join(pieces_of(tiny, ids, skip=skip, cuts=cuts))
    assert joined == tiny.decode(ids, skip_special_tokens=skip)


@given(TEXTS)
def test_text_comes_back_without_half_characters(tiny: Tokenizer, text: str):
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    pieces = pieces_of(tiny, tiny.encode(text, add_special_tokens=False), skip=False)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(TEXTS)
def test_sentencepiece_too(sentencepiece: Tokenizer, text: str):
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    ids = sentencepiece.encode(text, add_special_tokens=True)
    pieces = pieces_of(sentencepiece, ids, skip=True)
    assert "".join(pieces) == sentencepiece.decode(ids) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.model
@given(st.data())
def test_the_small_models_tokens(small: Tokenizer, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=60))
    text = data.draw(TEXTS)
    for tokens in (ids, small.encode(text, add_special_tokens=False)):
        assert "".join(pieces_of(small, tokens, skip=False)) == small.decode(
            tokens, skip_special_tokens=False
        )


def test_text_is_sent_as_soon_as_a_character_is_whole(tiny: Tokenizer):
    ids = tiny.encode("\U0001f600!", add_special_tokens=False)
    pieces = pieces_of(tiny, ids, skip=True)
    assert pieces[-3:] == ["\U0001f600", "!", ""]
    assert not any(pieces[:-3])


def test_flush_shows_an_unfinished_character_once(tiny: Tokenizer):
    detokenizer = IncrementalDetokenizer(tiny)
    first = tiny.encode("\U0001f600", add_special_tokens=False)[0]
    assert detokenizer.feed([first]) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_the_first_space_is_kept_when_the_text_goes_on(sentencepiece: Tokenizer):
    ids = sentencepiece.encode("hello world", add_special_tokens=False)
    assert IncrementalDetokenizer(sentencepiece).feed(ids) == "hello world"
    assert IncrementalDetokenizer(sentencepiece, continues=True).feed(ids) == " hello world"
