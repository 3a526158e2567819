"""A router process for test_server.py: PORT NUM_PROCESSES CONTEXT_URL GENERATION_URL."""

import sys
from dataclasses import dataclass

from diptych.discovery.static import StaticRegistry
from diptych.router.server import serve
from tests.router.conftest import Config


@dataclass(frozen=True)
class ProcessConfig(Config):
    context_url: str = ""
    generation_url: str = ""


def make_registry(config: ProcessConfig) -> StaticRegistry:
    return StaticRegistry.from_urls([config.context_url], [config.generation_url])


if __name__ == "__main__":
    from tests.router.route import ProcessConfig as Importable
    from tests.router.route import make_registry as importable

    port, num_processes, context_url, generation_url = sys.argv[1:]
    serve(
        Importable(
            port=int(port),
            num_workers=int(num_processes),
            server_keep_alive_timeout=1.0,
            context_url=context_url,
            generation_url=generation_url,
        ),
        importable,
    )
