"""What the HTTP application holds."""

from aiohttp import web

from diptych.worker.service import WorkerService

SERVICE = web.AppKey("service", WorkerService)
