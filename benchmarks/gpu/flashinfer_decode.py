"""flashinfer's attention of single tokens inside a CUDA graph: what `gpu_kernels.py` measures ours against."""

import torch
from torch import Tensor

from diptych.kernels.flashinfer_attention import AttentionShape, PagedContext


class FlashInferDecode:
    """One row a sequence, at a fixed number of rows."""

    def __init__(self, shape: AttentionShape, space: Tensor, num_rows: int, max_blocks: int) -> None:
        """`max_blocks`: of all rows together."""
        import flashinfer

        def ints(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=space.device)

        self._shape = shape
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            space,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=shape.num_heads > shape.num_kv_heads,
            paged_kv_indptr_buffer=ints(num_rows + 1),
            paged_kv_indices_buffer=ints(max_blocks),
            paged_kv_last_page_len_buffer=ints(num_rows),
        )

    def plan(self, context: PagedContext) -> None:
        shape = self._shape
        self._wrapper.plan(
            *context.tensors(shape.tokens_per_block),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.tokens_per_block,
            **shape.arguments(),
        )

    def run(self, query: Tensor, cache: Tensor, out: Tensor) -> None:
        self._wrapper.run(query, cache, out=out)
