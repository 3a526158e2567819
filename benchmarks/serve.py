"""Measures OpenAI servers as their clients see them: TTFT, ITL, TPOT, E2E, throughput; several in one run.

    python benchmarks/serve.py --target ours=http://localhost:8000 --target peer=http://localhost:9000,m \\
        --concurrency 1,8,32 --input-len 128 --output-len 64 --tokenizer DIR --output result.json

The targets take turns within each round, so that a machine that gets slower is slower for all; ratios are
against the first. Every answer is checked: errors and wrong token counts are part of the result.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
from serving import machine
from serving.load import Load, Run, drive
from serving.prompts import FastTokenizer, Prompt, PromptSource
from serving.request import Record, Target, complete
from serving.summary import ratios, summarise, table

# Fields beyond OpenAI's that make every answer as long as asked for; a server that refuses them does without.
_FULL_LENGTH = ({"ignore_eos": True, "min_tokens": True}, {"ignore_eos": True})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", action="append", required=True, metavar="NAME=URL[,MODEL]", type=parse_target
    )
    parser.add_argument("--concurrency", type=_numbers(int), default=[], metavar="N[,N...]")
    parser.add_argument(
        "--request-rate", type=_numbers(float), default=[], metavar="R[,R...]", help="requests/s"
    )
    parser.add_argument("--input-len", type=int, default=128, help="tokens of a prompt [128]")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer [64]")
    parser.add_argument(
        "--num-requests", type=int, help="for each target, load and round [4 x concurrency, 8 to 64]"
    )
    parser.add_argument("--rounds", type=int, default=2, help="[2]")
    parser.add_argument("--warmup", type=int, default=2, help="requests to each target before all else [2]")
    parser.add_argument(
        "--tokenizer", type=Path, help="directory with tokenizer.json: prompts of exact length"
    )
    parser.add_argument(
        "--prompts", choices=("text", "ids"), default="text", help="how prompts are sent [text]"
    )
    parser.add_argument(
        "--suppress-token", type=int, action="append", default=[], help="logit_bias -100 for this id"
    )
    parser.add_argument("--allow-eos", action="store_true", help="answers may end before --output-len")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one request [600]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    names = [target.name for target in options.target]
    if len(set(names)) != len(names):
        parser.error("every --target needs a name of its own")
    if options.prompts == "ids" and options.tokenizer is None:
        parser.error("--prompts ids needs --tokenizer")
    if not options.concurrency and not options.request_rate:
        options.concurrency = [1, 8, 32]
    return options


def parse_target(text: str) -> Target:
    name, _, rest = text.partition("=")
    url, _, model = rest.partition(",")
    if not name or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL or NAME=URL,MODEL")
    return Target(name=name, url=url.rstrip("/"), model=model)


def loads_of(options: argparse.Namespace) -> list[Load]:
    loads = [Load(concurrency=concurrency) for concurrency in options.concurrency]
    return loads + [Load(rate=rate) for rate in options.request_rate]


def num_requests_of(options: argparse.Namespace, load: Load) -> int:
    if options.num_requests is not None:
        return int(options.num_requests)
    return min(64, max(8, 4 * (load.concurrency or 8)))


class Benchmark:
    def __init__(self, options: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self._options = options
        self._session = session
        tokenizer = None if options.tokenizer is None else FastTokenizer.load(options.tokenizer)
        self._prompts = PromptSource(
            length=options.input_len, seed=options.seed, tokenizer=tokenizer, as_ids=options.prompts == "ids"
        )

    async def run(self) -> dict[str, Any]:
        result: dict[str, Any] = {"machine": machine.describe(), "settings": self._settings()}
        targets = [await self._prepared(target) for target in self._options.target]
        result["targets"] = [await self._about(target) for target in targets]
        result["loads"] = [await self._measure(load, targets) for load in loads_of(self._options)]
        return result

    async def _measure(self, load: Load, targets: list[Target]) -> dict[str, Any]:
        runs: dict[str, list[Run]] = {target.name: [] for target in targets}
        count = num_requests_of(self._options, load)
        for number in range(self._options.rounds):
            # The same prompts for all targets of a round; another order in each.
            prompts = [self._prompts.next() for _ in range(count)]
            shift = number % len(targets)
            for target in targets[shift:] + targets[:shift]:
                print(f"{load.label}, round {number + 1}: {target.name}", file=sys.stderr, flush=True)
                runs[target.name].append(await self._round(load, target, prompts, seed=number))
        results = {name: summarise(of_target) for name, of_target in runs.items()}
        first = results[targets[0].name]
        for name, result in results.items():
            if name != targets[0].name:
                result["ratio_to_first"] = ratios(result, first)
        print(table(load.label, results), flush=True)
        for name, result in results.items():
            for error, times in result["errors"].items():
                print(f"{name}: {times} x {error}", file=sys.stderr, flush=True)
        return {"concurrency": load.concurrency, "request_rate": load.rate, "results": results}

    async def _round(self, load: Load, target: Target, prompts: list[Prompt], *, seed: int) -> Run:
        async def send(number: int) -> Record:
            return await complete(self._session, target, prompts[number], max_tokens=self._options.output_len)

        return await drive(load, send, num_requests=len(prompts), seed=seed)

    async def _prepared(self, target: Target) -> Target:
        """The target with its model's name and the extra fields that it takes, warmed up."""
        model = target.model or await self._only_model(target)
        bias = {str(token): -100 for token in self._options.suppress_token}
        common: dict[str, Any] = {"logit_bias": bias} if bias else {}
        tries: list[dict[str, Any]] = [common]
        if not self._options.allow_eos:
            tries = [{**self._full_length(extra), **common} for extra in _FULL_LENGTH] + tries
        record = Record(wanted_tokens=0, error="not asked")
        for extra in tries:
            candidate = Target(name=target.name, url=target.url, model=model, extra=extra)
            record = await complete(
                self._session, candidate, self._prompts.next(), max_tokens=self._options.output_len
            )
            if record.error is None:
                for _ in range(self._options.warmup):
                    prompt = self._prompts.next()
                    await complete(self._session, candidate, prompt, max_tokens=self._options.output_len)
                return candidate
        raise SystemExit(f"error: {target.name} at {target.url} does not answer: {record.error}")

    def _full_length(self, extra: dict[str, Any]) -> dict[str, Any]:
        return {**extra, "min_tokens": self._options.output_len} if "min_tokens" in extra else extra

    async def _only_model(self, target: Target) -> str:
        try:
            async with self._session.get(f"{target.url}/v1/models") as response:
                models = [entry["id"] for entry in (await response.json())["data"]]
        except (aiohttp.ClientError, asyncio.TimeoutError, KeyError, ValueError) as error:
            raise SystemExit(f"error: {target.name} at {target.url} lists no models: {error}") from error
        if len(models) != 1:
            raise SystemExit(
                f"error: {target.name} serves {models}; name one: --target {target.name}=URL,MODEL"
            )
        return str(models[0])

    async def _about(self, target: Target) -> dict[str, Any]:
        about: dict[str, Any] = {
            "name": target.name,
            "url": target.url,
            "model": target.model,
            "extra": target.extra,
        }
        for path in ("/version", "/server_info"):
            try:
                async with self._session.get(f"{target.url}{path}") as response:
                    about[path.removeprefix("/")] = await response.json() if response.status == 200 else None
            except (aiohttp.ClientError, asyncio.TimeoutError, ValueError):
                about[path.removeprefix("/")] = None
        for field in ("tokenizer_path", "models"):  # paths of the server's machine
            (about["server_info"] or {}).pop(field, None)
        return about

    def _settings(self) -> dict[str, Any]:
        skipped = ("target", "output", "tokenizer")
        settings = {name: value for name, value in vars(self._options).items() if name not in skipped}
        return {**settings, "exact_lengths": self._options.tokenizer is not None}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    # A connection for each request: some servers close theirs after a stream, which would count as an error.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        return await Benchmark(options, session).run()


def _numbers(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if any(value <= 0 for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} must hold positive numbers")
        return values

    return parse


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    result = asyncio.run(measure(options))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = any(entry["errors"] for load in result["loads"] for entry in load["results"].values())
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
