"""Test modules may import the helpers that lie beside them."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("worker",)]
