"""What a sweep shows while it runs: a table on a terminal, a line for each run elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

import numpy as np

from sast_jax.text import align, printable

CLEAR = "\x1b[H\x1b[2J"


class Board:
    """Counts finished runs and shows where each method stands."""

    def __init__(self, planned: Mapping[str, tuple[int, int]], total_cost: float, *, stream: TextIO | None = None):
        """Starts with nothing done.

        Args:
            planned: Numbers of selection runs and of tested runs by method.
            total_cost: Sum of the costs of all runs, in any unit.
            stream: Standard error if not given.
        """
        self._stream = stream or sys.stderr
        self._planned, self._total_cost = planned, total_cost
        self._selected: dict[str, str] = {}
        self._validation: dict[str, list[float]] = {name: [] for name in planned}
        self._tested: dict[str, list[float]] = {name: [] for name in planned}
        self._num_done, self._cost, self._own_cost, self._seconds = 0, 0.0, 0.0, 0.0

    def selected(self, method: str, text: str) -> None:
        """Notes what was selected for a method."""
        self._selected[method] = text

    def done(self, method: str, run: str, accuracy: float | None, *, tested: bool, cost: float, seconds: float) -> None:
        """Counts a run.

        Args:
            method: Its method.
            run: Its name.
            accuracy: With hard spikes, on the validation part or, if `tested`, on the test part; `None` if it diverged.
            tested: Whether it is one of the tested runs.
            cost: Its cost in the unit of the total.
            seconds: Time it took just now; 0 if it had finished before.
        """
        (self._tested if tested else self._validation)[method].append(np.nan if accuracy is None else accuracy)
        self._num_done += 1
        self._cost += cost
        self._own_cost += cost if seconds else 0.0
        self._seconds += seconds
        if self._stream.isatty():
            print(CLEAR + self.table(), file=self._stream, flush=True)
        elif seconds:
            text = (
                "diverged" if accuracy is None else f"{accuracy:.1%} {'test' if tested else 'validation'} accuracy, hard spikes"
            )
            print(f"sweep: {self.progress()}; {printable(run)}: {text}", file=self._stream, flush=True)

    def progress(self) -> str:
        """Returns how many runs are done, and about how long the others take at the pace so far."""
        total = sum(map(sum, self._planned.values()))
        text = f"{self._num_done} of {total} runs"
        if not self._own_cost:
            return text
        # The total takes the mean cost of a grid's points for the one that will be selected, so that it may be too low.
        left = max(0.0, self._total_cost - self._cost) * self._seconds / self._own_cost
        return f"{text}, about {time.strftime('%H:%M', time.gmtime(left)) if left < 86400 else f'{left / 3600:.0f}'} h left"

    def table(self) -> str:
        """Returns the table."""
        header = ["method", "selection", "selected", "tested", "hard spikes"]
        rows = [
            [
                name,
                f"{len(self._validation[name])}/{num_selection}",
                self._selected.get(name, ""),
                f"{len(self._tested[name])}/{num_tested}",
                f"{np.nanmean(self._tested[name]):.1%}" if self._tested[name] else "",
            ]
            for name, (num_selection, num_tested) in self._planned.items()
        ]
        return f"{align([header, *rows])}\n\n{self.progress()}"
