"""Asks an HTTP server whether it is ready, again and again, until a deadline."""

import asyncio
import time
from collections.abc import Callable

import aiohttp

_INTERVAL_S = 0.1
_ATTEMPT_S = 2.0
_REPORT_S = 5.0


async def wait_healthy(url: str, *, timeout_s: float, waiting: Callable[[float], None]) -> bool:
    """True once GET url/health is 200. `waiting` is called every few seconds with the seconds gone by."""
    began = time.monotonic()
    reported = 0.0
    attempt = aiohttp.ClientTimeout(total=_ATTEMPT_S)
    async with aiohttp.ClientSession(timeout=attempt) as session:
        while (elapsed := time.monotonic() - began) < timeout_s:
            if elapsed - reported >= _REPORT_S:
                reported = elapsed
                waiting(elapsed)
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return True
            except (aiohttp.ClientError, asyncio.TimeoutError):
                pass
            await asyncio.sleep(_INTERVAL_S)
    return False
