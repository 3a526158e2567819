"""Which part of a model a rank holds."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import ranks

from diptych.errors import ConfigError
from diptych.kv_layout import KvLayout
from diptych.worker.models.config import ModelConfig, RopeConfig
from diptych.worker.parallel import ONE_RANK, ParallelDims

CONFIG = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=12,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


@given(st.integers(1, 8), st.integers(1, 16))
def test_parts_of_a_number_that_divides_join_to_the_whole(size, each):
    parts = [dims.part(size * each) for dims in ranks(size)]
    assert [index for part in parts for index in part] == list(range(size * each))


@given(st.integers(1, 8), st.integers(1, 4))
def test_neighbours_share_where_there_are_more_ranks_than_pieces(units, each):
    assert [list(dims.part(units)) for dims in ranks(units * each)] == [
        [unit] for unit in range(units) for _ in range(each)
    ]


def test_a_rank_computes_fewer_heads():
    local = ParallelDims(tp_size=4, tp_rank=3).local(CONFIG)
    assert (local.num_heads, local.num_kv_heads, local.intermediate_size) == (3, 1, 24)
    assert dataclasses.replace(local, num_heads=12, num_kv_heads=2, intermediate_size=96) == CONFIG
    assert ONE_RANK.local(CONFIG) == CONFIG


@pytest.mark.parametrize("size", [2, 4])
def test_the_layout_of_a_pool_names_the_heads_that_the_weights_compute(size):
    for dims in ranks(size):
        layout = KvLayout(
            num_layers=2,
            num_kv_heads=dims.local(CONFIG).num_kv_heads,
            total_kv_heads=CONFIG.num_kv_heads,
            head_dim=16,
            tokens_per_block=8,
            tp_rank=dims.tp_rank,
            tp_size=size,
        )
        assert layout.kv_heads == dims.part(CONFIG.num_kv_heads)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_a_model_that_cannot_be_cut(size):
    with pytest.raises(ConfigError) as error:
        ParallelDims(tp_size=size).local(CONFIG)
    assert f"tensor_parallel_size is {size}, and this model has 12 attention heads" in error.value.message
    assert "it can be cut into 1, 2, 4, 6, 12" in error.value.message


def test_the_head_is_cut_only_where_the_vocabulary_divides():
    assert ParallelDims(tp_size=2, tp_rank=1).head_rows(CONFIG) == slice(500, 1000)
    assert ParallelDims(tp_size=6, tp_rank=1).head_rows(CONFIG) == slice(None)
