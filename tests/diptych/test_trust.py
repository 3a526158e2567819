"""Who may use internal routes."""

import pytest

from diptych.errors import Forbidden
from diptych.trust import HEADER, ClusterTrust

HERE = ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"]
ELSEWHERE = ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "", None, "somewhere"]


@pytest.mark.parametrize("remote", HERE)
def test_without_a_secret_this_machine_is_trusted(remote):
    ClusterTrust(None).check(remote, {})


@pytest.mark.parametrize("remote", ELSEWHERE)
def test_and_no_other(remote):
    with pytest.raises(Forbidden, match="DIPTYCH_CLUSTER_SECRET"):
        ClusterTrust(None).check(remote, {})


def test_with_a_secret_everybody_must_show_it():
    trust = ClusterTrust("s3cret")
    trust.check("10.0.0.1", trust.headers())
    for headers in ({}, {HEADER: ""}, {HEADER: "s3creT"}, {HEADER: "ß"}):
        with pytest.raises(Forbidden, match=HEADER):
            trust.check("127.0.0.1", headers)


def test_the_environment_may_hold_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIPTYCH_CLUSTER_SECRET", "from there")
    assert ClusterTrust(None).headers() == {HEADER: "from there"}
    assert ClusterTrust("from here").headers() == {HEADER: "from here"}


def test_it_is_never_printed():
    assert "s3cret" not in repr(ClusterTrust("s3cret"))
