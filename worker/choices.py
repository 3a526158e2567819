"""The choices of one HTTP request, one for each (prompt, n) pair: what each asks of the engine, and its text so far.

A generation leg's choices begin where the context leg, or a worker that failed, has left them.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from diptych.errors import InvalidRequest
from diptych.openai import (
    ChatRequest,
    CompletionRequest,
    DisaggregatedParams,
    ResponseHead,
    SamplingDefaults,
    to_choice_text,
    to_sampling_params,
)
from diptych.text import ChoiceText
from diptych.wire import Submit, TokenEvent
from diptych.worker.prompts import check_length
from diptych.worker.service import WorkerService


@dataclass(slots=True)
class Choice:
    """One (prompt, n) pair. `submit` is None when its first token, drawn by the context leg, was its last."""

    index: int
    prompt: list[int]
    text: ChoiceText
    submit: Submit | None
    cached_tokens: int = 0
    has_fetched: bool | None = None  # its ticket is done, as the context worker hears; None: not known yet
    handed_on: DisaggregatedParams | None = None  # what the context leg tells the generation leg

    @property
    def is_done(self) -> bool:
        return self.text.finish_reason is not None


@dataclass(frozen=True, slots=True)
class ChoiceBuilder:
    """For one request."""

    service: WorkerService
    request: CompletionRequest | ChatRequest
    head: ResponseHead
    timeout_s: float

    def build(self, prompts: Sequence[list[int]]) -> list[Choice]:
        """In the client's numbering: all of the first prompt, then of the next. InvalidRequest says what is wrong."""
        return [
            self._choice(prompt_index * self.request.n + number, number, prompt)
            for prompt_index, prompt in enumerate(prompts)
            for number in range(self.request.n)
        ]

    def _choice(self, index: int, number: int, prompt: list[int]) -> Choice:
        request, service, leg = self.request, self.service, self.request.disaggregated_params
        max_seq_len = service.ready.max_seq_len
        check_length(len(prompt), request.max_tokens, max_seq_len)
        echoes = isinstance(request, CompletionRequest) and request.echo
        text = to_choice_text(request, service.tokenizer, echo=prompt if echoes else ())
        seeded, choice_index = request, number
        if request.seed is None and leg is not None and leg.seed is not None:
            # The router's seed stands for none: no two choices draw alike, equal prompts or not.
            seeded, choice_index = msgspec.structs.replace(request, seed=leg.seed), index
        params = to_sampling_params(
            seeded,
            vocab_size=service.ready.vocab_size,
            default_max_tokens=max_seq_len - len(prompt),
            choice_index=choice_index,
            defaults=SamplingDefaults(),
        )
        submit = Submit(
            request_id=f"{self.head.id}.{index}.{secrets.token_hex(3)}",
            prompt_token_ids=prompt,
            params=params,
            request_type=leg.request_type if leg else "context_and_generation",
            timeout_s=self.timeout_s,
            cache_salt=request.cache_salt,
        )
        if leg is None:
            return Choice(index, prompt, text, submit)
        owner = leg.followed_owner()
        if leg.request_type == "generation_only" and not owner:
            return _continued(index, prompt, text, submit, leg.of_choice(index))
        submit = msgspec.structs.replace(submit, owner=owner, handover_key=leg.handover_key(index))
        return Choice(index, prompt, text, submit)


def _continued(
    index: int, prompt: list[int], text: ChoiceText, submit: Submit, handed: DisaggregatedParams
) -> Choice:
    """A choice whose first tokens were drawn elsewhere: its text is brought to the same state."""
    first = handed.first_gen_tokens
    if first is None:
        raise InvalidRequest(
            "disaggregated_params.first_gen_tokens is missing; a generation leg needs the token that the "
            "context leg drew",
            param="disaggregated_params.first_gen_tokens",
        )
    cached = handed.cached_tokens or 0
    if not first and handed.finish_reason is None:
        submit = msgspec.structs.replace(submit, request_type="context_and_generation")
        return Choice(index, prompt, text, submit, cached)
    logprobs = handed.first_gen_logprobs
    if logprobs is not None and len(logprobs) != len(first):
        raise InvalidRequest(
            f"disaggregated_params.first_gen_logprobs has {len(logprobs)} entries; it must have one for "
            f"each of the {len(first)} first_gen_tokens",
            param="disaggregated_params.first_gen_logprobs",
        )
    of_prompt = handed.prompt_logprobs
    if of_prompt is not None and len(of_prompt) != len(prompt) - 1:
        raise InvalidRequest(
            f"disaggregated_params.prompt_logprobs has {len(of_prompt)} entries; it must have one for each "
            f"of the prompt's {len(prompt)} tokens but the first",
            param="disaggregated_params.prompt_logprobs",
        )
    ended = handed.finish_reason
    stop_token = handed.stop_reason if isinstance(handed.stop_reason, int) else None
    text.feed(
        TokenEvent(
            request_id="",
            token_ids=first,
            logprobs=logprobs,
            prompt_logprobs=of_prompt,
            finish_reason=ended,
            stop_token_id=stop_token,
        )
    )
    if text.finish_reason is not None:
        return Choice(index, prompt, text, None, cached)
    submit = msgspec.structs.replace(submit, output_token_ids=first, ticket=handed.ticket())
    return Choice(index, prompt, text, submit, cached)
