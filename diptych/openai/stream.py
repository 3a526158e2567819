"""One streamed response as server-sent events.

Called once for every token of every stream: all that repeats is rendered beforehand, and only the text is
escaped.
"""

from typing import Any

import orjson

from diptych.errors import DiptychError
from diptych.openai.responses import ResponseHead, Usage, finish_word, logprobs_json
from diptych.text import Delta

DONE = b"data: [DONE]\n\n"


class StreamWriter:
    """Gives the bytes of each event; the caller sends them, and skips empty ones.

    Order: `role` once for each choice of a chat, `delta` for every Delta, `usage`, DONE. A generation leg
    starts at `delta`, because the context leg has written the role and the first token.
    """

    def __init__(
        self,
        head: ResponseHead,
        *,
        include_usage: bool = False,
        continuous_usage: bool = False,
        with_token_ids: bool = False,
    ) -> None:
        is_chat = head.kind == "chat"
        fields = {
            "id": head.id,
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": head.created,
            "model": head.model,
        }
        self._kind = head.kind
        self._event = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        self._text_field = b'"delta":{"content":' if is_chat else b'"text":'
        self._after_text = b"}" if is_chat else b""
        self._no_finish = self._after_text + b',"logprobs":null,"finish_reason":null}]'
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._with_token_ids = with_token_ids
        self._no_usage = (b',"usage":null' if include_usage else b"") + b"}\n\n"
        self._plain_tail = self._no_finish + self._no_usage
        self._prefixes: dict[int, bytes] = {}

    def role(self, index: int, usage: Usage | None = None) -> bytes:
        """The first event of a chat's choice; a completion has none."""
        if self._kind != "chat":
            return b""
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""' % index
        return self._event + choice + self._no_finish + self._usage_tail(usage)

    def delta(self, index: int, delta: Delta, usage: Usage | None = None) -> bytes:
        """`usage` so far is printed when the client asked for it with every chunk."""
        if delta.finish_reason is None and delta.logprobs is None and not self._with_token_ids:
            if not delta.text:
                return b""
            tail = self._no_finish + self._usage_tail(usage) if self._continuous else self._plain_tail
            return b"".join((self._prefix(index), orjson.dumps(delta.text), tail))
        return self._full(index, delta) + self._usage_tail(usage)

    def usage(self, usage: Usage) -> bytes:
        """The last event before DONE, when the client asked for it."""
        if not self._include_usage:
            return b""
        return self._event + b'],"usage":' + orjson.dumps(usage.to_json()) + b"}\n\n"

    def error(self, error: DiptychError) -> bytes:
        """Ends a stream that has begun."""
        return b"data: " + orjson.dumps(error.body()) + b"\n\n" + DONE

    def _prefix(self, index: int) -> bytes:
        prefix = self._prefixes.get(index)
        if prefix is None:
            prefix = self._prefixes[index] = self._event + b'{"index":%d,' % index + self._text_field
        return prefix

    def _full(self, index: int, delta: Delta) -> bytes:
        """A chunk with more than text."""
        finish = finish_word(delta.finish_reason)
        rest: dict[str, Any] = {
            "logprobs": logprobs_json(self._kind, delta.logprobs),
            "finish_reason": finish,
        }
        if delta.finish_reason is not None:
            rest["stop_reason"] = delta.stop_reason
        if self._with_token_ids:
            rest["token_ids"] = delta.token_ids
        return b"".join(
            (
                self._prefix(index),
                orjson.dumps(delta.text),
                self._after_text,
                b",",
                orjson.dumps(rest)[1:],
                b"]",
            )
        )

    def _usage_tail(self, usage: Usage | None) -> bytes:
        if not self._continuous or usage is None:
            return self._no_usage
        return b',"usage":' + orjson.dumps(usage.to_json()) + b"}\n\n"
