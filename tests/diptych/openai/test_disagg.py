"""What the legs of one request call its prefills, and when a generation leg follows them."""

import pytest

from diptych.openai import DisaggregatedParams

ENDPOINT = "127.0.0.1:7000/a1"


def params(request_type="generation_only", **fields):
    given = {"disagg_request_id": "r", "schedule_style": "generation_first", "ctx_info_endpoint": ENDPOINT}
    return DisaggregatedParams(request_type=request_type, **{**given, **fields})


def test_both_legs_call_a_choices_prefill_the_same():
    assert params().handover_key(3) == params("context_only").handover_key(3) == "r/3"
    assert params(disagg_request_id=77).handover_key(0) == "77/0"


def test_only_the_generation_leg_follows():
    assert params().followed_owner() == ENDPOINT
    assert params("context_only").followed_owner() == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule_style": "context_first"},
        {"schedule_style": None},
        {"disagg_request_id": None},
        {"disagg_request_id": "x" * 129},
        {"request_type": "context_and_generation"},
    ],
)
def test_other_legs_have_no_prefill_to_follow(fields):
    assert params(**fields).handover_key(0) == params(**fields).followed_owner() == ""


@pytest.mark.parametrize("endpoint", [None, [ENDPOINT]])
def test_without_one_endpoint_nothing_is_followed(endpoint):
    assert params(ctx_info_endpoint=endpoint).followed_owner() == ""
