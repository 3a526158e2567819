"""Conversations that share system prompts, as an assistant with a few applications has them."""

import random
from dataclasses import dataclass

_WORDS = [
    *("harbour", "river", "engine", "paper", "window", "yellow"),
    *("quiet", "market", "signal", "garden", "winter", "copper"),
    *("letter", "station", "bridge", "morning", "valley", "lantern"),
    *("orchard", "thunder", "compass", "meadow", "pepper", "sailor"),
    *("velvet", "anchor", "cabin", "ticket", "violin", "desert"),
]


@dataclass(frozen=True)
class TraceShape:
    num_systems: int = 6
    system_words: int = 400
    conversations: int = 18
    turns: int = 4
    turn_words: int = 40
    output_tokens: int = 12
    concurrency: int = 4


@dataclass(frozen=True)
class Conversation:
    system: str
    turns: tuple[str, ...]


def conversations(shape: TraceShape, seed: int) -> list[Conversation]:
    """Popular system prompts are used more often: the k-th with weight 1/k."""
    rng = random.Random(seed)
    systems = [_text(rng, shape.system_words) for _ in range(shape.num_systems)]
    weights = [1 / (rank + 1) for rank in range(shape.num_systems)]
    return [
        Conversation(
            rng.choices(systems, weights)[0], tuple(_text(rng, shape.turn_words) for _ in range(shape.turns))
        )
        for _ in range(shape.conversations)
    ]


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))
