"""How a model is spread over the ranks of one worker, and which part of it one rank holds. Pure arithmetic.

Attention heads and the feed-forward block's inner width are cut (Shoeybi et al. 2019, "Megatron-LM"); KV heads
too, and where there are more ranks than KV heads neighbouring ranks hold the same one. Pipeline and expert
parallelism have their place here; the configuration refuses them until something acts on them.
"""

import dataclasses
from dataclasses import dataclass

from diptych.errors import ConfigError
from diptych.worker.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelDims:
    """Sizes of the worker, and the place of one rank in them."""

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    ep_size: int = 1

    def part(self, units: int) -> range:
        """This rank's of `units` indivisible pieces."""
        first = self.tp_rank * units // self.tp_size
        return range(first, first + max(1, units // self.tp_size))

    def cuts(self, units: int) -> bool:
        """Whether every rank gets as many of the pieces, and no two the same."""
        return units % self.tp_size == 0

    def spreads(self, units: int) -> bool:
        """Whether every rank gets as many, where two may hold the same."""
        return self.cuts(units) or self.tp_size % units == 0

    def head_rows(self, config: ModelConfig) -> slice:
        """The rows of the language model's head on this rank: all of them when the vocabulary does not divide."""
        if not self.cuts(config.vocab_size):
            return slice(None)
        rows = self.part(config.vocab_size)
        return slice(rows.start, rows.stop)

    def local(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank computes it: fewer heads and a narrower inner width, all else as it was.

        ConfigError when the model cannot be cut into so many parts.
        """
        if not self._fits(config):
            sizes = range(1, config.num_heads + 1)
            allowed = [str(size) for size in sizes if ParallelDims(tp_size=size)._fits(config)]
            raise ConfigError(
                f"tensor_parallel_size is {self.tp_size}, and this model has {config.num_heads} attention heads, "
                f"{config.num_kv_heads} KV heads and an intermediate size of {config.intermediate_size}; it can "
                f"be cut into {', '.join(allowed)}",
                param="tensor_parallel_size",
            )
        return dataclasses.replace(
            config,
            num_heads=len(self.part(config.num_heads)),
            num_kv_heads=len(self.part(config.num_kv_heads)),
            intermediate_size=len(self.part(config.intermediate_size)),
        )

    def _fits(self, config: ModelConfig) -> bool:
        return (
            self.cuts(config.num_heads)
            and self.cuts(config.intermediate_size)
            and self.spreads(config.num_kv_heads)
        )


ONE_RANK = ParallelDims()
