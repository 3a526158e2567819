"""How many rows are multiplied on a GPU: what adds the product to the residual stream, and what gates it."""

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no GPU")]


@pytest.mark.parametrize("rows", [40, 200, 1030])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_added_to_the_residual_stream(rows, with_bias):
    from diptych.worker.models.cuda_network import PartsLinear

    x, weight = torch.randn(rows, 520, device="cuda"), torch.randn(136, 520, device="cuda") * 520**-0.5
    bias = torch.randn(136, device="cuda") if with_bias else None
    residual = torch.randn(rows, 136, device="cuda")
    narrow = [None if tensor is None else tensor.bfloat16() for tensor in (weight, bias)]
    linear = PartsLinear(*narrow, num_sms=132)
    expected = residual.double() + torch.nn.functional.linear(
        x.bfloat16().double(), *(None if tensor is None else tensor.double() for tensor in narrow)
    )
    parts = linear.add_to(residual, x.bfloat16())
    found = residual.double() + parts.double().sum(0)
    assert (found - expected).norm() / expected.norm() < 3e-3
    assert (len(parts) == 0) == (rows > 1000 and not with_bias)


@pytest.mark.parametrize("rows", [1, 40, 200, 1030])
def test_the_gate_is_the_same_for_any_number_of_rows(rows):
    from diptych.worker.models.cuda_network import PartsLinear

    x, weight = torch.randn(rows, 520, device="cuda"), torch.randn(272, 520, device="cuda") * 520**-0.5
    gate, up = (x.bfloat16().double() @ weight.bfloat16().double().T).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    found = PartsLinear(weight.bfloat16(), None, num_sms=1).gated(x.bfloat16())
    assert (found - expected).norm() / expected.norm() < 1e-2
