"""A model on one GPU: fused kernels, CUDA graphs of small steps, memory measured by the largest step it may meet."""

import logging
import time

import torch
from torch import Tensor

from diptych.kernels.flashinfer_attention import AttentionShape
from diptych.kernels.skinny_linear_triton import MAX_ROWS
from diptych.kv_layout import DType, Inner
from diptych.wire import SamplingParams, Submit
from diptych.worker.collectives import ALONE, Collectives
from diptych.worker.computer import Progress
from diptych.worker.cuda_runner import CudaRunner
from diptych.worker.device_state import DeviceState
from diptych.worker.graphs import DecodeGraphs, graph_sizes
from diptych.worker.mixed_graphs import MAX_DRAWING, MixedGraphs, mixed_sizes
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.cuda_network import ADDED_ROWS, CudaNetwork, Rows
from diptych.worker.models.weights import DTYPES
from diptych.worker.plan import Chunk, StepPlan
from diptych.worker.prefill import choose_prefill
from diptych.worker.sampler import Sampler
from diptych.worker.sequence import Sequence
from diptych.worker.settings import EngineSettings

log = logging.getLogger(__name__)

_MAX_GRAPH_ROWS = 512  # above, launches take little of a step
_AMPERE = (8, 0)
_HEAD_DIMS = (32, 64, 128, 256)
_SPARE_BYTES = 1 << 30  # compiled kernels, graphs, and what the allocator loses in pieces
_WARM_UP_DECODES = 32  # from here on, decode attention has one plan
_WARM_UP_PROMPT = 2 * MAX_ROWS  # more rows than the products of few rows take
_WARM_UP_ROWS = (*(MAX_ROWS >> shift for shift in range(3)), ADDED_ROWS)  # each with products of its own
_LOGITS_COPIES = 4  # of a step's logits, for rows that the host draws


def unusable(config: ModelConfig, device: torch.device) -> str | None:
    """Why the kernels cannot run a model on a GPU; None: they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, and they need 8.0"
    if config.dtype == "float32":
        return "they compute in bfloat16 or float16, and the dtype is float32"
    if config.head_dim not in _HEAD_DIMS:
        return f"head_dim is {config.head_dim}, and they take {', '.join(map(str, _HEAD_DIMS))}"
    return None


class CudaComputer:
    inner: Inner = "hnd"
    overlaps = True

    def __init__(
        self,
        settings: EngineSettings,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: torch.device,
        ranks: Collectives = ALONE,
    ) -> None:
        """Takes the weights out of `weights`, which are this rank's, as `config` is."""
        self._settings = settings
        self._config = config
        self._device = device
        self._network = CudaNetwork(
            config, weights, device, config.max_position_embeddings, settings.dims, ranks
        )
        ranks.reserve(settings.max_num_tokens * config.hidden_size * self._network.dtype.itemsize)
        self._prefill = choose_prefill(self._attention_shape(), device)
        self._graph_rows = min(settings.max_batch_size, _MAX_GRAPH_ROWS)

    @property
    def kernel_name(self) -> str:
        return f"cuda-{self._prefill.name}"

    @property
    def kv_dtype(self) -> DType:
        return self._config.kv_dtype

    @property
    def _kv_dtype(self) -> torch.dtype:
        return DTYPES[self.kv_dtype]

    @torch.inference_mode()
    def reserved_bytes(self) -> int:
        """Runs the largest prefills and the largest steps of graphs, which share memory, over a scratch block."""
        rows, sequences = self._settings.max_num_tokens, self._settings.max_batch_size
        prefill = max(
            self._peak_bytes(count, min(count, sequences)) for count in self._network.largest_steps(rows)
        )
        mixed_rows = mixed_sizes(rows)[-1]
        graphs = max(
            self._peak_bytes(self._graph_rows, self._graph_rows),
            self._peak_bytes(mixed_rows, min(mixed_rows, sequences, MAX_DRAWING)),
        )
        logits = sequences * self._config.vocab_size * 4
        reserved = prefill + graphs + _LOGITS_COPIES * logits + _SPARE_BYTES
        log.info(
            "largest step: %d tokens take %.2f GiB, graphs of %d sequences or %d tokens %.2f GiB; kept free: %.2f GiB",
            rows, prefill / 2**30, self._graph_rows, mixed_rows, graphs / 2**30, reserved / 2**30,
        )  # fmt: skip
        torch.cuda.empty_cache()
        return reserved

    @torch.inference_mode()
    def start(self, pool: Tensor, max_seq_len: int, progress: Progress) -> CudaRunner:
        settings = self._settings
        max_blocks = -(-max_seq_len // settings.tokens_per_block)
        state = DeviceState(settings.max_batch_size, max_blocks, self._device)
        graphs = DecodeGraphs(self._network, state, pool, graph_sizes(self._graph_rows))
        mixed = MixedGraphs(self._network, state, pool, mixed_sizes(settings.max_num_tokens))
        started = time.monotonic()
        memory = graphs.capture(lambda fraction: progress("capturing graphs of decodes", fraction))
        mixed.capture(lambda fraction: progress("capturing graphs with prompts", fraction), memory)
        log.info(
            "captured graphs of %d batch sizes up to %d, and of %d numbers of rows up to %d with prompts, in %.1f s",
            len(graphs.sizes), graphs.sizes[-1], len(mixed.sizes), mixed.sizes[-1], time.monotonic() - started,
        )  # fmt: skip
        sampler = Sampler(frozenset(self._config.eos_token_ids))
        progress(f"preparing attention ({self._prefill.name}; the first time takes minutes)", 0.0)
        plain = CudaRunner(self._network, pool, state, self._prefill, None, sampler)
        _warm_up(plain, settings, max_seq_len)
        return CudaRunner(self._network, pool, state, self._prefill, graphs, sampler, mixed)

    def _attention_shape(self) -> AttentionShape:
        config = self._config
        return AttentionShape(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            tokens_per_block=self._settings.tokens_per_block,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
            dtype=self._network.dtype,
            kv_dtype=self._kv_dtype,
        )

    def _peak_bytes(self, num_rows: int, num_logits: int) -> int:
        config, device = self._config, self._device
        size = self._settings.tokens_per_block
        pool = torch.zeros(
            1, config.num_layers, 2, config.num_kv_heads, size, config.head_dim,
            dtype=self._kv_dtype, device=device,
        )  # fmt: skip
        zeros = torch.zeros(num_rows, dtype=torch.int32, device=device)
        rows = Rows(
            token_ids=zeros,
            attend=lambda parts, inputs, cache: cache.new_zeros(num_rows, config.num_heads, config.head_dim),
            logits_rows=torch.zeros(num_logits, dtype=torch.int64, device=device),
        )
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._network.forward(rows, pool)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before


def _warm_up(runner: CudaRunner, settings: EngineSettings, max_seq_len: int) -> None:
    """Prompts, short and long, beside numbers of decodes with a plan each: compiles what the graphs have not.

    `runner` has no graphs: prompts of any length may come beside one that is too long for them.
    """
    size = settings.tokens_per_block
    most = min(settings.max_num_tokens, max_seq_len - size)

    def run(num_decodes: int, start: int, count: int) -> None:
        chunks = [_warm_up_chunk(row, 0, 1, size) for row in range(num_decodes)]
        chunks.append(_warm_up_chunk(num_decodes, start, max(1, min(count, most)), size))
        runner.collect(runner.launch(StepPlan(chunks)))

    counts = [2**power for power in range(_WARM_UP_DECODES.bit_length())]
    for num_decodes in [count for count in counts if count < settings.max_batch_size] or [0]:
        for count in (2, _WARM_UP_PROMPT):
            run(num_decodes, 0, count)
    for count in _WARM_UP_ROWS:
        run(0, 0, count)
    if most > 0:
        run(0, size, _WARM_UP_PROMPT)  # a prompt whose first block is in the cache


def _warm_up_chunk(row: int, start: int, count: int, tokens_per_block: int) -> Chunk:
    length = start + count
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5)
    submit = Submit(request_id=f"warm-up-{row}", prompt_token_ids=[0] * length, params=params)
    sequence = Sequence(submit, 0.0)
    sequence.blocks = [0] * -(-length // tokens_per_block)  # of the pool, which nobody uses yet
    return Chunk(sequence, start, count, draws=True)
