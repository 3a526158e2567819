"""How long this thread's short sleeps are."""

import ctypes

_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000


def sharpen_timer() -> None:
    """This thread's short sleeps last as long as they say, not 50 microseconds more."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)
