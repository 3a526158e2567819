"""Which implementation is chosen, and what the log says about it."""

import logging

import pytest
import torch

from diptych.errors import ConfigError
from diptych.kernels import cpu_step
from diptych.worker.layers.linear import Dense, OneDnn
from diptych.worker.models import build, cpu_fused
from diptych.worker.models.config import ModelConfig, RopeConfig
from diptych.worker.models.weights import dummy_weights

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
CPU = torch.device("cpu")


class FakeStep:
    """Stands for the C++ step: keeps what it was given."""

    def __init__(self, shape, weights, cos, sin, num_threads):
        self.shape = shape
        self.names = set(weights)
        self.tables = cos.shape, sin.shape
        self.num_threads = num_threads
        self.closed = False

    def close(self):
        self.closed = True


@pytest.fixture
def fake_step(monkeypatch):
    monkeypatch.setattr(cpu_step, "isa", lambda: "portable")
    monkeypatch.setattr(cpu_step, "CpuStep", FakeStep)


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse():
        raise cpu_step.KernelUnavailable("no C++ compiler was found; install g++")

    monkeypatch.setattr(cpu_step, "isa", refuse)


def make(config=CONFIG, *, kernel="auto", tokens_per_block=32, **kwargs):
    weights = dummy_weights(config)
    model = build.build_model(
        config, weights, CPU, kernel=kernel, num_threads=1, tokens_per_block=tokens_per_block, **kwargs
    )
    assert weights == {}
    return model


def with_changes(**changes):
    from dataclasses import replace

    return replace(CONFIG, **changes)


@pytest.mark.usefixtures("fake_step")
@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_fused_when_it_can_be(kernel, caplog):
    model = make(kernel=kernel, max_positions=100)
    assert isinstance(model, cpu_fused.FusedModel)
    assert (model.kernel_name, model.inner, model.kv_dtype) == ("fused-portable", "vnni", "bfloat16")
    step = model._step
    assert step.tables == ((100, 16), (100, 16))
    assert {"embed_tokens", "lm_head", "norm", "layers.0.qkv", "layers.0.gate_up"} <= step.names
    assert (step.shape.num_kv_heads, step.shape.tokens_per_block, step.num_threads) == (1, 32, 1)
    assert caplog.records == []
    model.close()
    assert step.closed


@pytest.mark.usefixtures("no_compiler")
def test_torch_with_one_warning_when_there_is_no_compiler(caplog):
    with caplog.at_level(logging.INFO):
        model = make()
    assert model.kernel_name.startswith("torch")
    assert model.inner == "hnd"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "install g++" in record.getMessage()


@pytest.mark.usefixtures("no_compiler")
def test_fused_by_name_without_a_compiler_is_an_error():
    with pytest.raises(ConfigError, match="install g\\+\\+"):
        make(kernel="fused")


@pytest.mark.usefixtures("fake_step")
@pytest.mark.parametrize(
    ("config", "tokens_per_block", "word"),
    [
        (with_changes(dtype="float32"), 32, "float32"),
        (with_changes(o_bias=True), 32, "bias"),
        (with_changes(intermediate_size=40), 32, "intermediate_size"),
        (CONFIG, 24, "tokens_per_block"),
    ],
)
def test_what_the_fused_step_cannot_run_runs_on_torch(config, tokens_per_block, word, caplog):
    model = make(config, tokens_per_block=tokens_per_block)
    assert model.inner == "hnd"
    [record] = caplog.records
    assert word in record.getMessage()
    with pytest.raises(ConfigError, match=word):
        make(config, kernel="fused", tokens_per_block=tokens_per_block)


@pytest.mark.usefixtures("fake_step")
def test_torch_by_name(caplog):
    model = make(kernel="torch")
    assert model.kernel_name in {Dense().name, OneDnn().name}
    assert model.kv_dtype == "bfloat16"
    assert make(with_changes(dtype="float32"), kernel="torch").kernel_name == Dense().name
    assert caplog.records == []


def test_fused_is_for_cpus():
    with pytest.raises(ConfigError, match="cuda"):
        build.build_model(
            CONFIG,
            dummy_weights(CONFIG),
            torch.device("cuda"),
            kernel="fused",
            num_threads=1,
            tokens_per_block=32,
        )


def test_every_family_has_its_model():
    from importlib import import_module
    from typing import get_args

    from diptych.worker.models.config import Family

    assert set(build._FAMILIES) == set(get_args(Family))
    for place in build._FAMILIES.values():
        module, _, name = place.partition(":")
        assert callable(getattr(import_module(module), name).build)
