import pytest

from diptych import errors


@pytest.mark.parametrize("leaf", errors._LEAVES)
def test_an_error_survives_the_wire(leaf):
    error = leaf("what was wrong", param="field")
    back = errors.from_wire(leaf.status, error.body()["error"])
    assert type(back) is leaf or leaf is errors.TransferError
    assert back.body()["error"]["message"] == "what was wrong" and back.param == "field"


def test_unknown_statuses_and_codes_become_something_sensible():
    assert type(errors.from_wire(418, {"message": "tea"})) is errors.DiptychError
    assert type(errors.from_wire(503, {"message": "x", "code": "new"})) is errors.Unavailable


def test_retry_after_is_whole_seconds():
    assert errors.Overloaded("busy", retry_after_s=0.2).headers() == {"Retry-After": "1"}
    assert errors.Overloaded("busy").headers() == {}
