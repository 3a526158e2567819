"""`trtllm-serve warmup`: compiles and caches what a worker needs, without weights, so that its start is short.

It starts the engine that `trtllm-serve MODEL` would start with the same options, on random weights, and stops it.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace

from diptych.config import LlmConfig
from diptych.model_source import resolve_model
from diptych.wire import EngineProgress, EngineReady
from diptych.worker.engine_client import EngineClient
from diptych.worker.hardware import detect
from diptych.worker.settings import engine_settings


def run(config: LlmConfig, show: Callable[[str], None]) -> EngineReady:
    """StartupError when the engine cannot start; `show` gets what it is busy with, a line each."""
    return asyncio.run(_start_once(replace(config, load_format="dummy"), show))


async def _start_once(config: LlmConfig, show: Callable[[str], None]) -> EngineReady:
    path = resolve_model(config.model, config.revision, with_weights=False)
    settings = engine_settings(config, path, detect(config), incarnation=secrets.token_hex(8), secret=None)
    engine = EngineClient(settings, hang_timeout_s=config.hang_timeout_s)
    shown = ""

    def progress(message: EngineProgress) -> None:
        nonlocal shown
        if message.message != shown:
            shown = message.message
            show(shown)

    try:
        return await engine.start(progress)
    finally:
        await engine.close()
