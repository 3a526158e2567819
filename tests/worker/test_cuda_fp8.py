"""The GPU's runner with FP8 weights and an FP8 cache, against a plain float32 model of the same numbers."""

import pytest
import torch

from diptych.kernels.flashinfer_attention import is_installed
from diptych.wire import SamplingParams
from diptych.worker.models.fp8_weights import may_stay, quantize_rows, scale_name
from diptych.worker.models.quantization import Quantization
from diptych.worker.precision import has_fp8
from tests.worker.test_cuda_runner import (
    DEVICE,
    NUM_TOKENS,
    ON_GPU,
    config_of,
    cuda_runner,
    pytestmark,
    reference_logits,
    requests_of,
    scheduler_of,
    serve,
    weights_of,
)

__all__ = ["pytestmark"]


def quantized(weights):
    """As the GPU keeps them, and the same numbers as plain weights."""
    kept, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        if may_stay(name, tuple(weight.shape)):
            values, scale = quantize_rows(weight)
            kept[name], kept[scale_name(name)] = values, scale
            plain[name] = values.float() * scale[:, None]
    return kept, plain


def distance(config, kept, plain, **options):
    """How far the drawn tokens' logits are below the highest, at most and on average, over the spread of logits."""
    max_num_tokens = options.pop("max_num_tokens")
    requests = requests_of([SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)])
    found = serve(cuda_runner(config, kept, **options), requests, scheduler=scheduler_of(max_num_tokens))
    gaps = []
    for request in requests:
        outputs = torch.tensor(found[request.request_id])
        logits = reference_logits(config, plain, request, outputs.tolist())
        highest = logits.amax(1)
        drawn = logits.gather(1, outputs[:, None])[:, 0]
        gaps.append((highest - drawn) / (highest - logits.mean(1)))
    gap = torch.cat(gaps)
    return float(gap.max()), float(gap.mean())


# Up to 64 tokens in a step activations keep their digits; above, each has three bits of mantissa.
CASES = {
    "weights": (Quantization("fp8"), 48, 0.03, 0.003),
    "cache": (Quantization(fp8_kv=True), 48, 0.1, 0.01),
    "weights_and_cache": (Quantization("fp8", fp8_kv=True), 48, 0.1, 0.01),
    "activations": (Quantization("fp8", fp8_kv=True), 128, 0.3, 0.03),
}


@pytest.mark.parametrize("case", CASES if ON_GPU else ["weights", "weights_and_cache"])
@pytest.mark.parametrize(
    "fields", [{"qk_norm": True}, {"family": "llama", "o_bias": True, "num_kv_heads": 4, "head_dim": 32}]
)
@pytest.mark.parametrize("prompts", ["mixed", "plain", "flashinfer"])
def test_tokens_are_likely_in_float32(case, fields, prompts):
    flashinfer = prompts == "flashinfer"
    if flashinfer and not (ON_GPU and is_installed() and "head_dim" not in fields):
        pytest.skip("flashinfer is not installed")
    if ON_GPU and not has_fp8(DEVICE):
        pytest.skip("this GPU does not compute with FP8")
    quantization, max_num_tokens, largest, average = CASES[case]
    config = config_of("bfloat16" if ON_GPU else "float16", quantization=quantization, **fields)
    kept, plain = quantized(weights_of(config))
    if quantization.weights == "plain":
        kept = plain = weights_of(config)
    found = distance(
        config, kept, plain, max_num_tokens=max_num_tokens, mixed=prompts == "mixed", flashinfer=flashinfer
    )
    assert found[0] <= largest, found
    assert found[1] <= average, found
