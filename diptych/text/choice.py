"""The text of one choice: token events in, what a client may see out.

Joins the detokenizer, the stop strings and the bookkeeping of log probabilities. Deterministic in the
tokens it is fed: a generation leg that feeds the context leg's tokens first is in the context leg's state.
Knows nothing of engines, JSON or HTTP.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from diptych.text.detokenizer import IncrementalDetokenizer
from diptych.text.stop import StopStrings
from diptych.text.tokenizer import Tokenizer
from diptych.wire import FinishReason, Logprob, TokenEvent

ChoiceEnd = FinishReason | Literal["not_finished"]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One drawn token as log probabilities are printed: by its bytes, which may be part of a character."""

    token: bytes
    logprob: float | None  # None: the first of a prompt
    top: tuple[tuple[bytes, float], ...]  # most likely first
    text_offset: int  # characters of the choice's text before this token


class Delta(msgspec.Struct, frozen=True):
    """What one event adds. With `finish_reason` set, it is the choice's last.

    `stop_reason` is the stop string or the id of the stop token, and None when the model ended by itself.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    finish_reason: ChoiceEnd | None = None
    stop_reason: str | int | None = None
    logprobs: Sequence[TokenLogprob] | None = None


class ChoiceText:
    """Feed it every TokenEvent of one sequence, in order.

    When a stop string is found, the delta says "stop" before the engine does: the caller aborts the
    sequence, and what still comes is answered with empty deltas. An event that carries a ticket ends this
    leg as "not_finished", with nothing flushed: the generation leg goes on from there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        detokenize: bool = True,
        continues: bool = False,
        echo: Sequence[int] = (),
    ) -> None:
        """`echo`, a prompt, goes in front of the text; `continues`: the text goes on from the prompt's last word."""
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, continues=continues
        )
        self._stops = StopStrings(stops, include_stop=include_stop)
        self._has_stops = bool(stops)
        self._hidden_ends = (
            frozenset() if include_stop else frozenset((*stop_token_ids, *tokenizer.eos_token_ids))
        )
        self._min_tokens = min_tokens
        self._detokenize = detokenize
        self._skip_special_tokens = skip_special_tokens
        self._prompt = echo
        self._echo = tokenizer.decode(echo, skip_special_tokens=skip_special_tokens) if echo else ""
        self._num_chars = len(self._echo)  # decoded so far, the part held back for a stop string included
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None
        self.finish_reason: ChoiceEnd | None = None
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """All text so far that is safe to show."""
        return "".join(self._pieces)

    def feed(self, event: TokenEvent) -> Delta:
        if self.finish_reason is not None:
            return Delta()
        ids = event.token_ids
        end = event.finish_reason if event.ticket is None else "not_finished"
        hides_last = end == "stop" and bool(ids) and ids[-1] in self._hidden_ends
        if self._has_stops or event.logprobs is not None:
            return self._feed_each(event, hides_last=hides_last, end=end)
        text = self._decode(ids[:-1] if hides_last else ids)
        return self._delta(text, ids, end, event.stop_token_id, None)

    def _feed_each(self, event: TokenEvent, *, hides_last: bool, end: ChoiceEnd | None) -> Delta:
        """Token by token, because a stop string ends the choice at the token that completes it."""
        ids, text = event.token_ids, ""
        logprobs: list[TokenLogprob] | None = None if event.logprobs is None else []
        if logprobs is not None and event.prompt_logprobs is not None:
            logprobs += self._of_prompt(event.prompt_logprobs)
        for i, token_id in enumerate(ids):
            if logprobs is not None and event.logprobs is not None:
                logprobs.append(self._logprob(event.logprobs[i], self._num_chars))
            if hides_last and i == len(ids) - 1:
                break
            piece = self._decode((token_id,))
            if len(self.token_ids) + i < self._min_tokens:
                text += piece
                continue
            safe, stop = self._stops.feed(piece)
            text += safe
            if stop is not None:
                return self._delta(text, ids[: i + 1], "stop", stop, logprobs)
        return self._delta(text, ids, end, event.stop_token_id, logprobs)

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not self._detokenize:
            return ""
        text = self._detokenizer.feed(token_ids)
        self._num_chars += len(text)
        return text

    def _of_prompt(self, entries: Sequence[Logprob]) -> list[TokenLogprob]:
        """`entries`: of the prompt's tokens but the first, before which there is nothing."""
        first, *others = self._prompt
        text = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=self._skip_special_tokens)
        told = [TokenLogprob(self._tokenizer.token_bytes(first), None, (), 0)]
        offset = len(text.feed((first,)))
        for token_id, entry in zip(others, entries, strict=True):
            told.append(self._logprob(entry, offset))
            offset += len(text.feed((token_id,)))
        return told

    def _logprob(self, entry: Logprob, offset: int) -> TokenLogprob:
        bytes_of = self._tokenizer.token_bytes
        top = tuple((bytes_of(token_id), logprob) for token_id, logprob in entry.top)
        return TokenLogprob(bytes_of(entry.token_id), entry.logprob, top, offset)

    def _delta(
        self,
        text: str,
        token_ids: Sequence[int],
        end: ChoiceEnd | None,
        stop_reason: str | int | None,
        logprobs: list[TokenLogprob] | None,
    ) -> Delta:
        if end is not None:
            if end != "not_finished" and not isinstance(stop_reason, str):
                tail, stop = self._stops.feed(self._detokenizer.flush())
                text += tail
                if stop is None:
                    text += self._stops.flush()
                else:
                    end, stop_reason = "stop", stop
            self.finish_reason, self.stop_reason = end, stop_reason
        if self._echo:
            text, self._echo = self._echo + text, ""
        if text:
            self._pieces.append(text)
        self.token_ids.extend(token_ids)
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(logprobs)
        return Delta(text, token_ids, end, stop_reason, logprobs)
