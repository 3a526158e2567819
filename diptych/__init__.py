"""Diptych: prefill and decode on separate workers, behind the interface of trtllm-serve."""

__version__ = "0.1.0"
