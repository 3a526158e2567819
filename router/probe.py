"""Asking one worker how it is: GET /server_info, or GET /health where that does not exist."""

from dataclasses import dataclass, field

import msgspec

from diptych.errors import Unavailable
from diptych.router.client import WorkerClient
from diptych.wire import WorkerState


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a worker makes token ids of texts and messages."""

    tokenizer_path: str  # on its machine
    fingerprint: str
    chat_template: str | None  # instead of the tokenizer's own


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says of itself."""

    state: WorkerState = "READY"
    models: tuple[str, ...] = ()  # the names it answers to, its own first; empty: it did not say
    incarnation: str = ""
    role: str = ""
    version: str = ""
    text: TextRules | None = None  # None: it did not say
    tokens_per_block: int | None = None
    block_hash: str = ""  # the algorithm
    max_batch_size: int | None = None  # sequences in one step
    kv_endpoint: str = ""  # where generation workers follow its prefills; empty: they cannot
    num_requests: float = field(default=0.0, compare=False)  # running and waiting, now


class _ServerInfo(msgspec.Struct):
    state: WorkerState = "READY"
    model: str | None = None
    models: list[str] = []
    incarnation: str | None = None
    role: str | None = None
    version: str | None = None
    tokenizer_path: str | None = None
    tokenizer_fingerprint: str | None = None
    chat_template: str | None = None
    tokens_per_block: int | None = None
    max_batch_size: int | None = None
    kv_cache_hash_algo: str | None = None
    kv_endpoint: str | None = None
    load: dict[str, float] = {}

    @property
    def text(self) -> TextRules | None:
        if not self.tokenizer_fingerprint:
            return None
        return TextRules(self.tokenizer_path or "", self.tokenizer_fingerprint, self.chat_template)


async def ask(client: WorkerClient, deadline: float) -> WorkerFacts:
    """Raises the client's errors, and Unavailable when the worker answers that it is not well."""
    reply = await client.request("GET", "/server_info", deadline=deadline)
    if reply.status == 404:
        reply = await client.request("GET", "/health", deadline=deadline)
        if reply.status == 200:
            return WorkerFacts()
    if reply.status != 200:
        raise Unavailable(f"The worker at {client.url} answers its probe with status {reply.status}.")
    try:
        info = msgspec.json.decode(reply.body, type=_ServerInfo)
    except msgspec.DecodeError as error:
        raise Unavailable(
            f"The worker at {client.url} answers its probe with something else: {error}."
        ) from None
    names = dict.fromkeys(name for name in (info.model, *info.models) if name)
    return WorkerFacts(
        state=info.state,
        models=tuple(names),
        incarnation=info.incarnation or "",
        role=info.role or "",
        version=info.version or "",
        text=info.text,
        tokens_per_block=info.tokens_per_block,
        block_hash=info.kv_cache_hash_algo or "",
        max_batch_size=info.max_batch_size,
        kv_endpoint=info.kv_endpoint or "",
        num_requests=info.load.get("running", 0.0) + info.load.get("waiting", 0.0),
    )
