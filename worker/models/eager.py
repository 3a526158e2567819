"""Runs a torch model step by step, on any device."""

from typing import Protocol

import torch
from torch import Tensor

from diptych.kv_layout import DType, Inner
from diptych.worker.models.config import ModelConfig
from diptych.worker.step import StepBatch, StepContext


class Network(Protocol):
    """A family's torch model."""

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor: ...


class EagerModel:
    """The `Model` of build.py over a `Network`."""

    inner: Inner = "hnd"

    def __init__(
        self, network: Network, config: ModelConfig, device: torch.device, *, kernel_name: str
    ) -> None:
        self.kernel_name = kernel_name
        self.kv_dtype: DType = config.kv_dtype
        self._network = network
        self._config = config
        self._device = device
        self._pool: Tensor | None = None

    def bind(self, pool: Tensor) -> None:
        config = self._config
        assert pool.ndim == 6
        assert pool.device.type == self._device.type
        assert pool.shape[1:4] == (config.num_layers, 2, config.num_kv_heads)
        assert pool.shape[5] == config.head_dim
        self._pool = pool

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        assert self._pool is not None, "bind comes before forward"
        context = StepContext.from_batch(batch, self._pool, self._config.sliding_window)
        token_ids = torch.from_numpy(batch.token_ids.astype("int64")).to(self._device, non_blocking=True)
        logits = self._network.forward(token_ids, context)
        if self._device.type == "cuda" and len(batch.logits_rows) == 0:
            # Nobody will wait for this step's result, yet its blocks may be given away once it is over.
            torch.cuda.synchronize(self._device)
        return logits

    def close(self) -> None:
        self._pool = None
