"""Tickets of a revoked request come back, whichever of answer and revocation is first."""

from diptych.worker.handed_out import HandedOut


def test_revoked_after_the_answer():
    handed_out = HandedOut()
    assert handed_out.add("r1", ["a", "b"]) == ()
    assert handed_out.revoke("r1") == ["a", "b"]
    assert handed_out.revoke("r1") == ()


def test_revoked_before_the_answer():
    handed_out = HandedOut()
    assert handed_out.revoke("r1") == ()
    assert handed_out.add("r1", ["a"]) == ["a"]
    assert handed_out.add("r2", ["b"]) == ()


def test_the_oldest_are_forgotten():
    handed_out = HandedOut(capacity=2)
    for number in range(3):
        handed_out.add(number, [str(number)])
    assert [handed_out.revoke(number) for number in (2, 1, 0)] == [["2"], ["1"], ()]
