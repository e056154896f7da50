"""Ctrl-C and SIGTERM as a request that the training loop honours between two steps."""

import signal
import threading


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`; a second SIGINT acts as usual.

    Outside the main thread, where Python allows no signal handlers, it changes nothing.
    """

    def __init__(self):
        """Nothing is requested yet."""
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
