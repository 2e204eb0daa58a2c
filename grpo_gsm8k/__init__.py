"""SFT → expert iteration → GRPO on GSM8K, on one node, readable in an evening."""

import _signal  # type: ignore[import-not-found]  # `signal` takes 3 ms to load, in which Ctrl-C would be printed

_mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
try:
    from grpo_gsm8k import interrupts

    if interrupts.is_command():  # here, since any import from now on may be the one that Ctrl-C hits
        interrupts.guard()
finally:
    _signal.pthread_sigmask(_signal.SIG_SETMASK, _mask)

__version__ = "0.1.0"
