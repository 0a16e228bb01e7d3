"""The console script: answers Ctrl-C from its first line on.

Beside the packages, since the import of any of them takes seconds, in which an interruption would
end in a traceback. All else is in `secure_cnn.cli`.
"""

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130
_LAST_WORDS = "interrupted"


def main() -> None:
    """Runs the command line; one line and exit code 130 where it is interrupted.

    Example:
        >>> callable(main)
        True
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from secure_cnn.cli import main as command

    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, usual)
    try:
        command()
    except KeyboardInterrupt:
        print(_LAST_WORDS, file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _leave(_number: int = 0, _frame: FrameType | None = None) -> None:
    """Ends at once: libraries that are half imported turn an exception into others of their own."""
    os.write(2, f"{_LAST_WORDS}\n".encode())
    os._exit(_INTERRUPTED)
