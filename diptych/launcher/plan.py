"""What to start: one member for each process that a disaggregated YAML file describes. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diptych.config import DisaggConfig, ServerSection
from diptych.config.disagg import disagg_config
from diptych.discovery.address import parse_address
from diptych.errors import ConfigError
from diptych.wire import Role

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # small, real, and installed with one package

_LOCAL = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One worker: what it serves, where it listens (port 0: any), and the content of its YAML file."""

    name: str
    role: Role
    model: str
    host: str = _LOCAL
    port: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_gpus(self) -> int:
        """That it computes on, where there are any."""
        return 0 if self.options.get("device") == "cpu" else int(self.options.get("tensor_parallel_size", 1))


def default_config(overrides: Mapping[str, Any] | None = None) -> DisaggConfig:
    """One context and one generation worker with the small model."""
    section = {"num_instances": 1}
    data = {"model": DEFAULT_MODEL, "context_servers": section, "generation_servers": section}
    return disagg_config(data, source="the default configuration", overrides=overrides)


def members(config: DisaggConfig) -> list[Member]:
    """The workers, context first. A worker that both sections name is started once and does both."""
    if config.model is None:
        raise ConfigError("model is missing: `up` starts the workers, so the file must say what they serve")
    if config.disagg_cluster is not None:
        raise ConfigError("disagg_cluster is not in this version; give num_instances or urls instead")
    context = _of_section(config.context_servers, "ctx", "CONTEXT", config.model)
    generation = _of_section(config.generation_servers, "gen", "GENERATION", config.model)
    found = _join(context, generation)
    if not found:
        raise ConfigError("there is nothing to start: context_servers and generation_servers are both empty")
    return found


def _of_section(section: ServerSection, prefix: str, role: Role, model: str) -> list[Member]:
    if not section.urls:
        return [
            Member(name=f"{prefix}{index}", role=role, model=model, options=section.options)
            for index in range(section.count)
        ]
    addresses = [parse_address(url) for url in section.urls]
    return [
        Member(
            name=f"{prefix}{index}",
            role=role,
            model=model,
            host=address.host,
            port=address.port,
            options=section.options,
        )
        for index, address in enumerate(addresses)
    ]


def _join(context: list[Member], generation: list[Member]) -> list[Member]:
    """Members that differ only in their role, on one address, become one that does both."""
    by_address = {(member.host, member.port): member for member in generation if member.port}
    joined: list[Member] = []
    for member in context:
        twin = by_address.pop((member.host, member.port), None)
        if twin is None:
            joined.append(member)
            continue
        if twin.options != member.options:
            raise ConfigError(
                f"{member.host}:{member.port} is a context and a generation server with different options; "
                "give both sections the same ones"
            )
        joined.append(
            Member(
                name=f"{member.name}+{twin.name}",
                role="BOTH",
                model=member.model,
                host=member.host,
                port=member.port,
                options=member.options,
            )
        )
    alone = [member for member in generation if not member.port or (member.host, member.port) in by_address]
    return joined + alone
