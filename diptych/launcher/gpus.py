"""Which GPUs each worker may see: as many as it has ranks, and no GPU twice while there are enough.

Found without a GPU library: by the driver's device files, or as CUDA_VISIBLE_DEVICES names them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diptych.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES takes, of the GPUs that this process may use."""
    chosen = environment.get(VARIABLE)
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    numbers = [re.fullmatch(r"nvidia(\d+)", path.name) for path in devices.glob("nvidia*")]
    return [str(number) for number in sorted(int(match[1]) for match in numbers if match)]


def assign(sizes: Mapping[str, int], gpus: Sequence[str]) -> dict[str, list[str]]:
    """For each worker's name its GPUs; `sizes` says how many it needs, 0: none.

    With fewer GPUs than are needed workers share them in turn. ConfigError when one worker needs more than there are.
    """
    assigned: dict[str, list[str]] = {}
    at = 0
    for name, size in sizes.items():
        if size > len(gpus):
            raise ConfigError(
                f"{name} has tensor_parallel_size {size}, and there are {len(gpus)} GPUs; lower it, or let "
                f"{VARIABLE} name more"
            )
        if at + size > len(gpus):
            at = 0  # a worker's own GPUs differ, whoever shares them
        assigned[name] = list(gpus[at : at + size])
        at += size
    return assigned
