"""Text in, token ids out, and back: tokenizer, chat template, incremental detokenizer, stop strings.

Needs `tokenizers` and jinja2; knows nothing of torch, HTTP or the engine.
"""

from diptych.text.choice import ChoiceEnd, ChoiceText, Delta, TokenLogprob
from diptych.text.detokenizer import IncrementalDetokenizer
from diptych.text.stop import StopStrings
from diptych.text.tokenizer import Tokenizer

__all__ = [
    "ChoiceEnd",
    "ChoiceText",
    "Delta",
    "IncrementalDetokenizer",
    "StopStrings",
    "TokenLogprob",
    "Tokenizer",
]
