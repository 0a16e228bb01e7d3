"""One piece of work at a time beside the training loop; its error surfaces at the next call."""

import threading
from collections.abc import Callable
from typing import final

__all__ = ["Background"]


@final
class Background:
    """Runs work in a thread, never two at once."""

    __slots__ = ("_error", "_thread")

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts work, after the work before is done.

        Raises:
            BaseException: What the work before raised; then the new work is not started.
        """
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
                if not threading.main_thread().is_alive():
                    # The program is ending and makes no next call: say it on stderr.
                    raise

        self._thread = threading.Thread(target=run, name="checkpoint store")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no work is under way.

        Raises:
            BaseException: What the work raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
