from pathlib import Path

import pytest

from diptych.config import MetadataConfig, load_metadata_config
from diptych.config.metadata import metadata_config
from diptych.errors import ConfigError


def test_example_as_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metadata.yaml"
    path.write_text('hostname: "localhost"\nport: 2379\nhealth_check_timeout: 5.0\nrefersh_interval: 7.0\n')
    assert load_metadata_config(path) == MetadataConfig(refresh_interval=7.0)
    [message] = caplog.messages
    assert "refresh_interval" in message
    assert "server_type" in message


def test_right_spelling_says_nothing(caplog: pytest.LogCaptureFixture):
    data = {"server_type": "etcd", "hostname": "h", "port": 1, "refresh_interval": 2}
    assert metadata_config(data, source="f").refresh_interval == 2
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"server_type": "zookeeper"}, "server_type must be one of etcd, not 'zookeeper'"),
        ({"hostnam": "x"}, 'did you mean "hostname"?'),
        ({"health_check_timeout": 0}, "health_check_timeout must be a number > 0.0, not 0"),
    ],
)
def test_sentences(data: dict, expected: str):
    with pytest.raises(ConfigError) as caught:
        metadata_config(data, source="f")
    assert expected in caught.value.message


def test_several_endpoints_and_tls():
    data = {"server_type": "etcd", "endpoints": ["a:1", "http://b:2"], "ca_file": "ca.pem"}
    assert metadata_config(data, source="f").urls == ("https://a:1", "https://b:2")
    assert metadata_config({"hostname": "::1"}, source="f").urls == ("http://[::1]:2379",)
    assert metadata_config({"tls": True}, source="f").urls == ("https://localhost:2379",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"endpoints": ["a"]}, "'a' is not a host:port"),
        ({"cert_file": "c.pem"}, "cert_file and key_file belong together"),
        ({"password": "p"}, "password needs user"),
    ],
)
def test_settings_that_do_not_fit_together(data, words):
    with pytest.raises(ConfigError, match=words):
        metadata_config(data, source="f")


def test_the_password_is_not_printed():
    assert "geheim" not in repr(metadata_config({"user": "u", "password": "geheim"}, source="f"))
