"""Text in, token ids out, and back: tokenizer, chat template, incremental detokenizer, stop strings.

Needs `tokenizers` and jinja2; knows nothing of torch, HTTP or the engine.
"""






__all__ = ["ChoiceText", "Delta", "IncrementalDetokenizer", "StopStrings", "TokenLogprob", "Tokenizer"]
