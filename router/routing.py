"""Where the legs of a request go: the policies of both roles, and what they need to know of it.

A policy that looks at prefixes needs the prompt as tokens, and an index of what is in the workers' caches;
both exist only when a router section asks for such a policy.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType

import msgspec

from diptych.config.routing import KvCacheAwareOptions, PolicyOptions, policy_options
from diptych.errors import DeadlineExceeded
from diptych.router.deadline import within
from diptych.router.frontends.openai import Call
from diptych.router.metrics import Metrics
from diptych.router.policies import RoutingPolicy, load_policy
from diptych.router.policies.request import RouteRequest
from diptych.router.pool import Pool
from diptych.router.prefix_follow import PrefixFollower
from diptych.router.prefix_index import PrefixIndex
from diptych.router.prefix_metrics import PrefixCollector
from diptych.router.probe import TextRules
from diptych.router.settings import RouterSettings
from diptych.router.tokenization import Prompt, PromptReader
from diptych.router.worker_view import LegRole, WorkerView

_TOKENS_PER_BLOCK = 32
_BYTES_PER_TOKEN = 4  # of a body that nobody has tokenized
_PRELOAD_S = 3600.0


class Routing:
    """Use as ``async with``: with a prefix-aware policy, workers' caches are followed inside."""

    def __init__(
        self, pool: Pool, metrics: Metrics, settings: RouterSettings, *, rng: random.Random | None = None
    ) -> None:
        sections = {"CONTEXT": settings.context_servers, "GENERATION": settings.generation_servers}
        rng = rng or random.Random()
        self._pool = pool
        self._metrics = metrics
        self._options: dict[str, PolicyOptions] = {
            role: policy_options(
                section.router.type, section.router.options, source=f"{role.lower()}_servers.router"
            )
            for role, section in sections.items()
        }
        self._policies: dict[str, RoutingPolicy] = {
            role: load_policy(section.router.type, self._options[role], rng)
            for role, section in sections.items()
        }
        conditional = settings.conditional_disagg_config
        self._max_local_prefill = None if conditional is None else conditional.max_local_prefill_length
        self._index = PrefixIndex()
        self._follower = PrefixFollower(pool, self._index, self._looks_at)
        self._stack = AsyncExitStack()
        self._reader: PromptReader | None = None
        aware = [options for options in self._options.values() if isinstance(options, KvCacheAwareOptions)]
        if aware:
            places = (*(options.tokenizer_dir for options in aware), settings.model)
            self._reader = PromptReader(place for place in places if place)
            metrics.registry.register(PrefixCollector(self._index, self._follower))

    async def __aenter__(self) -> "Routing":
        if self._reader is not None:
            self._stack.push_async_callback(self._reader.close)
            await self._stack.enter_async_context(self._follower)
            preload = asyncio.create_task(self._preload(self._reader), name="preload-tokenizer")
            self._stack.callback(preload.cancel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def route(self, call: Call) -> "Route":
        """What the policies need of this request. Its bodies then hold the prompt's token ids."""
        prompt = None
        if self._reader is not None:
            try:
                prompt = await within(
                    call.deadline - time.monotonic(),
                    self._reader.read(
                        call.path, call.body, self._text_rules(call.model), self._block_sizes(call.model)
                    ),
                )
            except asyncio.TimeoutError:
                raise DeadlineExceeded("The prompt was not tokenized before the deadline.") from None
        if prompt is not None and prompt.was_text:
            call = msgspec.structs.replace(call, prompt_token_ids=prompt.to_json())
        return Route(self, call, prompt)

    # What a route asks

    def request(
        self, role: LegRole, call: Call, prompt: Prompt | None, candidates: Sequence[WorkerView]
    ) -> RouteRequest:
        if prompt is None:
            return RouteRequest(num_tokens=len(call.body) // _BYTES_PER_TOKEN, session=call.session)
        matched: Mapping[str, int] = {}
        if isinstance(self._options[role], KvCacheAwareOptions):
            now = time.monotonic()
            matched = {worker.worker_id: self._matched_tokens(worker, prompt, now) for worker in candidates}
        return RouteRequest(num_tokens=prompt.num_tokens, matched_tokens=matched, session=call.session)

    def policy(self, role: LegRole) -> RoutingPolicy:
        return self._policies[role]

    def local_worker(self, call: Call, prompt: Prompt | None) -> WorkerView | None:
        """Conditional disaggregation: the generation worker that has so much of the prompt in its cache that
        computing the rest there costs less than a leg of its own."""
        if self._max_local_prefill is None or prompt is None:
            return None
        candidates = self._pool.unhindered(self._pool.ready("GENERATION", call.model))
        if not candidates:
            return None
        request = self.request("GENERATION", call, prompt, candidates)
        worker = self._policies["GENERATION"].pick(request, candidates)
        matched = request.matched(worker)
        if matched == 0 or prompt.num_tokens - matched > self._max_local_prefill:
            return None
        self._metrics.local_prefills.inc()
        return worker

    def started(
        self, role: LegRole, request: RouteRequest, worker: WorkerView, prompt: Prompt | None
    ) -> None:
        self._policies[role].started(request, worker)
        options = self._options[role]
        if prompt is None or not isinstance(options, KvCacheAwareOptions):
            return
        self._metrics.prefix_tokens.labels(role.lower()).inc(prompt.num_tokens)
        self._metrics.prefix_matched.labels(role.lower()).inc(request.matched(worker))
        if options.track_routed_blocks:
            now = time.monotonic()
            for keys in prompt.keys.get(self._tokens_per_block(worker), ()):
                self._index.expect(worker.worker_id, keys, now)

    def ended(self, role: LegRole, request: RouteRequest, worker: WorkerView, prompt: Prompt | None) -> None:
        self._policies[role].ended(request, worker)
        if prompt is not None and isinstance(self._options[role], KvCacheAwareOptions):
            now = time.monotonic()
            for keys in prompt.keys.get(self._tokens_per_block(worker), ()):
                self._index.settle(worker.worker_id, keys, now)

    # Facts of workers

    def _looks_at(self, worker: WorkerView) -> bool:
        return any(worker.has_role(role) for role in self._aware_roles())

    def _aware_roles(self) -> list[LegRole]:
        roles: tuple[LegRole, ...] = ("CONTEXT", "GENERATION")
        return [role for role in roles if isinstance(self._options[role], KvCacheAwareOptions)]

    def _text_rules(self, model: str | None) -> set[TextRules | None]:
        """Of every worker that may see the token ids."""
        roles: tuple[LegRole, ...] = ("CONTEXT", "GENERATION")
        return {
            worker.facts.text
            for role in roles
            for worker in self._pool.ready(role, model)
            if worker.facts is not None
        }

    def _block_sizes(self, model: str | None) -> set[int]:
        return {
            self._tokens_per_block(worker)
            for role in self._aware_roles()
            for worker in self._pool.ready(role, model)
        }

    def _tokens_per_block(self, worker: WorkerView) -> int:
        if worker.facts is not None and worker.facts.tokens_per_block:
            return worker.facts.tokens_per_block
        given = (
            options.tokens_per_block
            for options in self._options.values()
            if isinstance(options, KvCacheAwareOptions) and options.tokens_per_block
        )
        return next(given, _TOKENS_PER_BLOCK)

    def _matched_tokens(self, worker: WorkerView, prompt: Prompt, now: float) -> int:
        size = self._tokens_per_block(worker)
        prompts = prompt.keys.get(size, ())
        return size * sum(self._index.match(worker.worker_id, keys, now) for keys in prompts)

    async def _preload(self, reader: PromptReader) -> None:
        """So that the first request need not wait for it."""
        if await self._pool.wait_until(lambda pool: bool(self._text_rules(None)), _PRELOAD_S):
            await reader.tokenizer_of(self._text_rules(None))


class Route:
    """One request's way. It has one leg at a time: to pick ends the leg before, to leave ends the last.

    Legs that run at the same time have a route each (`beside`).
    """

    __slots__ = ("_leg", "_local", "_prompt", "_routing", "call")

    def __init__(self, routing: Routing, call: Call, prompt: Prompt | None) -> None:
        self.call = call
        self._routing = routing
        self._prompt = prompt
        self._local: WorkerView | None = None
        self._leg: tuple[LegRole, RouteRequest, WorkerView] | None = None

    def __enter__(self) -> "Route":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def stays_local(self) -> bool:
        """Whether a generation worker is to do all of the request; that worker is then picked first."""
        self._local = self._routing.local_worker(self.call, self._prompt)
        return self._local is not None

    def beside(self) -> "Route":
        return Route(self._routing, self.call, self._prompt)

    def pick(self, role: LegRole, candidates: Sequence[WorkerView]) -> WorkerView:
        """The worker for a leg that begins now."""
        self.end()
        routing = self._routing
        request = routing.request(role, self.call, self._prompt, candidates)
        local, self._local = self._local, None
        worker = local if local in candidates else routing.policy(role).pick(request, candidates)
        assert worker is not None
        routing.started(role, request, worker, self._prompt)
        self._leg = (role, request, worker)
        return worker

    def end(self) -> None:
        """The leg is over, if there is one."""
        leg, self._leg = self._leg, None
        if leg is not None:
            self._routing.ended(*leg, self._prompt)
