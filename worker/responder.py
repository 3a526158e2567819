"""The generating endpoints of a worker: whole answers, streams, and the two legs of docs/protocol.md."""

import asyncio
from contextlib import aclosing

import msgspec
import orjson
from aiohttp import web

from diptych import journal
from diptych.errors import DeadlineExceeded, DiptychError, InvalidRequest
from diptych.openai import (
    DONE,
    ChatRequest,
    CompletionRequest,
    ContextAnswer,
    Kind,
    StreamWriter,
    new_head,
    new_response_id,
    parse_chat,
    parse_completion,
    render_response,
)
from diptych.telemetry import Timeline
from diptych.text import Delta
from diptych.wire import FETCHED_HEADER, SamplingParams, Submit, TokenEvent
from diptych.worker.choices import Choice
from diptych.worker.job import Job
from diptych.worker.keys import SERVICE
from diptych.worker.prompts import tokenize_prompts
from diptych.worker.service import WorkerService

_DEFAULT_TIMEOUT_S = 1800.0
_JSON = "application/json"
_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


async def complete(http: web.Request) -> web.StreamResponse:
    return await _respond(http, "completion")


async def chat(http: web.Request) -> web.StreamResponse:
    return await _respond(http, "chat")


async def tokenize(http: web.Request) -> web.Response:
    """`{"prompt": text}` or `{"messages": [...]}` in, `{"tokens": [...], "count": n}` out."""
    service = http.app[SERVICE]
    service.check_ready()
    body = await http.read()
    request = parse_chat(body) if b'"messages"' in body else parse_completion(body)
    (tokens, *_) = await _tokenize(service, request)
    return web.Response(body=orjson.dumps({"tokens": tokens, "count": len(tokens)}), content_type=_JSON)


async def probe(service: WorkerService) -> None:
    """Draw one token of nothing in particular; raises when the engine does not."""
    done: asyncio.Future[TokenEvent] = asyncio.get_running_loop().create_future()
    request_id = new_response_id("completion")
    params = SamplingParams(max_tokens=1, temperature=0.0)
    submit = Submit(request_id=request_id, prompt_token_ids=[0], params=params)
    service.engine.submit(submit, lambda event: None if done.done() else done.set_result(event))
    try:
        event = await done
    finally:
        service.engine.abort(request_id)
    if event.error is not None:
        raise DiptychError(event.error)


async def _respond(http: web.Request, kind: Kind) -> web.StreamResponse:
    timeline = Timeline()
    service = http.app[SERVICE]
    service.check_ready()
    body = await http.read()
    request = parse_chat(body) if kind == "chat" else parse_completion(body)
    leg = request.disaggregated_params
    if leg is not None:
        service.trust.check_secret(http.headers)
    service.check_model(request.model)
    with service.place(is_second_leg=leg is not None and leg.request_type == "generation_only"):
        return await _run(http, service, request, kind, timeline)


async def _run(
    http: web.Request,
    service: WorkerService,
    request: CompletionRequest | ChatRequest,
    kind: Kind,
    timeline: Timeline,
) -> web.StreamResponse:
    leg = request.disaggregated_params
    prompts = await _tokenize(service, request)
    timeline.mark("tokenize")
    head = new_head(
        kind,
        service.config.model_name,
        response_id=leg.response_id if leg else None,
        created=leg.created if leg else None,
    )
    request_id = http.headers.get("X-Request-ID", head.id)
    job = Job(
        service,
        request,
        head,
        prompts,
        timeline,
        request_id=request_id,
        timeout_s=_timeout_s(http),
        journaled=request.stream and http.headers.get(journal.HEADER) == "1",
    )
    try:
        job.start()
        if request.stream and not job.is_context_leg:
            return await _stream(http, job, request, timeline)
        response = await _whole(job, request, timeline)
        if job.is_context_leg:
            _note_tickets(http, job, request)
        return response
    finally:
        job.close()


def _note_tickets(http: web.Request, job: Job, request: CompletionRequest | ChatRequest) -> None:
    """Tickets are given away with the answer, unless nobody is there to take it."""
    service, leg, ticket_ids = http.app[SERVICE], request.disaggregated_params, job.ticket_ids()
    assert leg is not None
    if http.transport is not None and not http.transport.is_closing():
        key = leg.disagg_request_id
        ticket_ids = [] if key is None else [*service.handed_out.add(key, ticket_ids)]
    for ticket_id in ticket_ids:
        service.engine.release(ticket_id)


async def _tokenize(service: WorkerService, request: CompletionRequest | ChatRequest) -> list[list[int]]:
    return await tokenize_prompts(
        request,
        service.tokenizer,
        chat_template=service.config.chat_template,
        vocab_size=service.ready.vocab_size,
    )


def _timeout_s(http: web.Request) -> float:
    given = http.headers.get("X-Diptych-Timeout-Ms")
    if given is None:
        return _DEFAULT_TIMEOUT_S
    if not given.isdecimal():
        raise InvalidRequest(f"X-Diptych-Timeout-Ms is {given!r}; it must be a whole number of milliseconds")
    return int(given) / 1000


def _writer(job: Job, request: CompletionRequest | ChatRequest) -> StreamWriter:
    return StreamWriter(
        job.head,
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
        with_token_ids=request.return_token_ids,
    )


async def _whole(job: Job, request: CompletionRequest | ChatRequest, timeline: Timeline) -> web.Response:
    """One JSON object: a whole answer, or a context leg's."""
    writer = _writer(job, request) if job.is_context_leg and request.stream else None
    parts: list[bytes] = [] if writer is None else [writer.role(choice.index) for choice in job.choices]
    async with aclosing(job.deltas()) as batches:
        async for batch in batches:
            if writer is not None:
                for choice, delta in batch:
                    # The generation leg prints how a choice ends, unless it has ended already.
                    shown = delta if delta.finish_reason != "not_finished" else _open_ended(delta)
                    parts.append(writer.delta(choice.index, shown, job.running_usage()))
    if writer is not None and job.finished:
        parts += [writer.usage(job.usage()), DONE]
    context = None
    if job.is_context_leg:
        stream_head = None if writer is None else b"".join(parts)
        context = ContextAnswer(prompt_token_ids=job.prompts, finished=job.finished, stream_head=stream_head)
    timeline.mark("decode")
    return web.Response(
        body=render_response(job.head, job.results(), job.usage(), context=context),
        content_type=_JSON,
        headers=_headers(job, timeline),
    )


def _open_ended(delta: Delta) -> Delta:
    return msgspec.structs.replace(delta, finish_reason=None)


async def _stream(
    http: web.Request, job: Job, request: CompletionRequest | ChatRequest, timeline: Timeline
) -> web.StreamResponse:
    writer = _writer(job, request)
    end = journal.END if job.journaled else b""
    leg = request.disaggregated_params
    goes_on = leg is not None and leg.request_type == "generation_only"  # the roles are written
    response: web.StreamResponse | None = None
    try:
        async with aclosing(job.deltas()) as batches:
            async for batch in batches:
                data = b"".join(_chunks(job, writer, batch))
                if response is None:
                    # Only now: an error before the first token still has its HTTP status.
                    response = await _begin(http, job, timeline)
                    if not goes_on:
                        data = b"".join(writer.role(choice.index) for choice in job.choices) + data
                data = job.take_journal_line() + data
                if data:
                    await response.write(data)
    except DiptychError as error:
        if response is None:
            raise
        if job.journaled and not isinstance(error, DeadlineExceeded):
            # A stream that breaks off: the router goes on with it elsewhere.
            _break_off(http)
        else:
            await response.write(end + writer.error(error))
        return response
    if response is None:
        response = await _begin(http, job, timeline)
    await response.write(end + writer.usage(job.usage()) + DONE)
    return response


def _break_off(http: web.Request) -> None:
    if http.transport is not None:
        http.transport.close()


def _chunks(job: Job, writer: StreamWriter, batch: list[tuple[Choice, Delta]]) -> list[bytes]:
    return [writer.delta(choice.index, delta, job.running_usage()) for choice, delta in batch]


async def _begin(http: web.Request, job: Job, timeline: Timeline) -> web.StreamResponse:
    response = web.StreamResponse(headers={**_STREAM_HEADERS, **_headers(job, timeline)})
    if job.journaled:
        response.headers[journal.HEADER] = "1"
    await response.prepare(http)
    return response


def _headers(job: Job, timeline: Timeline) -> dict[str, str]:
    headers = {"Server-Timing": timeline.server_timing(job.stage_prefix), "X-Request-ID": job.request_id}
    if job.has_fetched is not None:
        headers[FETCHED_HEADER] = str(int(job.has_fetched))
    return headers
