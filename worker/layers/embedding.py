"""Token ids to vectors, and vectors to logits."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diptych.worker.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Embedding:
    weight: Tensor  # [vocab, hidden], all of it on every rank: a sum over ranks would cost more than it saves

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


@dataclass(frozen=True, slots=True)
class LmHead:
    linear: Linear  # its weight may be the embedding's

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).float()
