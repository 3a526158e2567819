from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.text import ChoiceText, Delta, Tokenizer
from diptych.wire import FinishReason, Logprob, TokenEvent


def event(ids: Sequence[int], finish: FinishReason | None = None, **fields) -> TokenEvent:
    return TokenEvent(request_id="r", token_ids=list(ids), finish_reason=finish, **fields)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def feed_each(choice: ChoiceText, ids: Sequence[int], finish: FinishReason | None) -> list[Delta]:
    """One token an event, the last one with `finish`; stops when the choice ends, as callers do."""
    deltas = []
    for i, token_id in enumerate(ids):
        deltas.append(choice.feed(event([token_id], finish if i == len(ids) - 1 else None)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def test_text_and_the_end(tiny: Tokenizer):
    choice = ChoiceText(tiny)
    deltas = feed_each(choice, encode(tiny, "hello world"), "length")
    assert "".join(delta.text for delta in deltas) == choice.text == "hello world"
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert choice.finish_reason == "length"
    assert choice.token_ids == encode(tiny, "hello world")


def test_the_models_own_end_is_not_text(tiny: Tokenizer):
    (eos,) = tiny.eos_token_ids
    for skip in (True, False):
        choice = ChoiceText(tiny, skip_special_tokens=skip)
        delta = choice.feed(event([*encode(tiny, "hello"), eos], "stop"))
        assert (delta.text, delta.finish_reason, delta.stop_reason) == ("hello", "stop", None)
        assert choice.token_ids[-1] == eos


def test_ignored_eos_in_the_middle_is_text_when_special_tokens_are_shown(tiny: Tokenizer):
    (eos,) = tiny.eos_token_ids
    choice = ChoiceText(tiny, skip_special_tokens=False)
    choice.feed(event([eos, *encode(tiny, "x")], "length"))
    assert choice.text == "<|im_end|>x"


@pytest.mark.parametrize(("include", "expected"), [(False, "hello"), (True, "hello!")])
def test_stop_tokens(tiny: Tokenizer, include: bool, expected: str):
    (mark,) = encode(tiny, "!")
    choice = ChoiceText(tiny, stop_token_ids=[mark], include_stop=include)
    delta = choice.feed(event([*encode(tiny, "hello"), mark], "stop", stop_token_id=mark))
    assert (delta.text, delta.stop_reason) == (expected, mark)


@pytest.mark.parametrize(("include", "expected"), [(False, "hello "), (True, "hello world")])
def test_a_stop_string_ends_before_the_engine_does(tiny: Tokenizer, include: bool, expected: str):
    choice = ChoiceText(tiny, stops=["world"], include_stop=include)
    ids = encode(tiny, "hello world and more")
    deltas = feed_each(choice, ids, None)
    assert "".join(delta.text for delta in deltas) == choice.text == expected
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "world")
    assert len(choice.token_ids) < len(ids)
    assert choice.feed(event(ids, "cancelled")) == Delta()
    assert choice.finish_reason == "stop"


def test_tokens_after_the_stop_string_in_one_event_do_not_count(tiny: Tokenizer):
    ids = encode(tiny, "a.b.c.d")
    choice = ChoiceText(tiny, stops=["b."])
    logprobs = [Logprob(token_id, -1.0) for token_id in ids]
    delta = choice.feed(event(ids, "length", logprobs=logprobs))
    assert (delta.text, delta.finish_reason) == ("a.", "stop")
    assert list(delta.token_ids) == ids[:4]
    assert delta.logprobs is not None
    assert len(delta.logprobs) == 4


def test_held_text_comes_at_the_end(tiny: Tokenizer):
    choice = ChoiceText(tiny, stops=["###"])
    deltas = feed_each(choice, encode(tiny, "a##"), "length")
    assert choice.text == "a##"
    assert deltas[-1].text.endswith("##")


def test_an_unfinished_character_comes_at_the_end_and_can_be_a_stop(tiny: Tokenizer):
    first = encode(tiny, "\U0001f600")[0]
    choice = ChoiceText(tiny)
    assert choice.feed(event([first], "length")).text == "\N{REPLACEMENT CHARACTER}"
    choice = ChoiceText(tiny, stops=["\N{REPLACEMENT CHARACTER}"])
    delta = choice.feed(event([first], "length"))
    assert (delta.text, delta.finish_reason) == ("", "stop")


def test_min_tokens_lets_early_stop_strings_pass(tiny: Tokenizer):
    ids = encode(tiny, "a.b.c")
    choice = ChoiceText(tiny, stops=["."], min_tokens=2)
    feed_each(choice, ids, "length")
    assert (choice.text, choice.stop_reason) == ("a.b", ".")


def test_echo_comes_first_and_never_stops(tiny: Tokenizer):
    ids = encode(tiny, " b")
    choice = ChoiceText(tiny, echo=encode(tiny, "a."), stops=["."])
    logprobs = [Logprob(token_id, -1.0) for token_id in ids]
    delta = choice.feed(event(ids, "length", logprobs=logprobs))
    assert delta.text == "a. b"
    assert delta.logprobs is not None
    assert delta.logprobs[0].text_offset == 2


def test_an_echo_tells_the_log_probabilities_of_the_prompt(tiny: Tokenizer):
    prompt, ids = encode(tiny, "a\U0001f600b"), encode(tiny, " c")
    choice = ChoiceText(tiny, echo=prompt)
    told = [Logprob(token_id, -2.0, [(token_id, -2.0)]) for token_id in prompt[1:]]
    logprobs = [Logprob(token_id, -1.0) for token_id in ids]
    delta = choice.feed(event(ids, "length", logprobs=logprobs, prompt_logprobs=told))
    assert delta.logprobs is not None
    assert b"".join(entry.token for entry in delta.logprobs).decode() == "a\U0001f600b c" == delta.text
    assert [entry.logprob for entry in delta.logprobs] == [
        None,
        *[-2.0] * (len(prompt) - 1),
        *[-1.0] * len(ids),
    ]
    offsets = [entry.text_offset for entry in delta.logprobs]
    assert offsets == sorted(offsets)
    assert offsets[: len(prompt) + 1] == [0, *[1] * (len(prompt) - 2), 2, 3]


def test_without_detokenizing_only_ids_come(tiny: Tokenizer):
    ids = encode(tiny, "hello")
    choice = ChoiceText(tiny, detokenize=False)
    delta = choice.feed(event(ids, "length"))
    assert (delta.text, list(delta.token_ids)) == ("", ids)


def test_logprobs_carry_bytes_and_offsets(tiny: Tokenizer):
    ids = encode(tiny, "a\U0001f600b")
    choice = ChoiceText(tiny)
    for i, token_id in enumerate(ids):
        logprob = Logprob(token_id, -0.5, [(token_id, -0.5), (ids[0], -2.0)])
        choice.feed(event([token_id], "length" if i == len(ids) - 1 else None, logprobs=[logprob]))
    assert choice.logprobs is not None
    assert b"".join(entry.token for entry in choice.logprobs).decode() == "a\U0001f600b"
    assert [entry.text_offset for entry in choice.logprobs] == [0, *[1] * (len(ids) - 2), 2]
    assert choice.logprobs[1].top == ((choice.logprobs[1].token, -0.5), (b"a", -2.0))


@given(
    st.text("ab.# é\U0001f600", max_size=16), st.integers(0, 16), st.sampled_from([(), ("##",), (".a", "b")])
)
def test_both_legs_say_what_one_would(tiny: Tokenizer, text: str, cut: int, stops: tuple[str, ...]):
    ids = encode(tiny, text) or encode(tiny, "a")
    whole = ChoiceText(tiny, stops=stops)
    feed_each(whole, ids, "length")

    cut = min(cut, len(ids) - 1)
    sent = ""
    context = ChoiceText(tiny, stops=stops)
    for i, token_id in enumerate(ids[:cut]):
        delta = context.feed(event([token_id], ticket=b"t" if i == cut - 1 else None))
        sent += delta.text
        if delta.finish_reason == "stop":
            assert sent == whole.text
            return
    assert context.finish_reason == ("not_finished" if cut else None)

    generation = ChoiceText(tiny, stops=stops)
    generation.feed(event(ids[:cut]))  # the client has this text
    sent += "".join(delta.text for delta in feed_each(generation, ids[cut:], "length"))
    assert sent == whole.text == generation.text
    assert generation.finish_reason == whole.finish_reason


def test_cancelled_and_failed_sequences_end_too(tiny: Tokenizer):
    for reason in ("cancelled", "error", "timeout"):
        choice = ChoiceText(tiny, stops=["##"])
        choice.feed(event(encode(tiny, "a#")))
        delta = choice.feed(event([], reason))
        assert (delta.text, delta.finish_reason, choice.text) == ("#", reason, "a#")
