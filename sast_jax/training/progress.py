"""A progress bar on a terminal, plain lines elsewhere."""

import shutil
import sys
import time
from typing import TextIO

from tqdm import tqdm

from sast_jax.text import printable


class Progress:
    """Shows how far training is, with loss, accuracy and the time left.

    On a terminal a bar that updates in place; elsewhere (a log file, a pipe) one line per epoch.
    """

    def __init__(self, title: str, *, step: int, num_steps: int, stream: TextIO | None = None):
        """Starts at `step` of `num_steps`; `stream` is standard error if not given."""
        self._stream = stream or sys.stderr
        self._title, self._first_step, self._num_steps = printable(title), step, num_steps
        self._start = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            size = shutil.get_terminal_size()  # tqdm shows nothing on a terminal that says it has 0 lines; here it has 24.
            self._bar = tqdm(
                total=num_steps,
                initial=step,
                desc=self._title,
                unit="step",
                file=self._stream,
                ncols=size.columns,
                nrows=size.lines,
            )

    def advance(self) -> None:
        """Moves the bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def note(self, text: str) -> None:
        """Shows a line."""
        line = f"{self._title}: {printable(text)}"
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def report(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a finished epoch."""
        shown = {
            "loss": f"{metrics['loss']:.3f}",
            "accuracy": f"{metrics['accuracy']:.1%}",
            "validation": " / ".join(
                f"{metrics[key]:.1%} {mode}"
                for mode in ("surrogate", "hard")
                if (key := f"validation_{mode}_accuracy") in metrics
            ),
        }
        shown = {key: value for key, value in shown.items() if value}
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        left = (time.monotonic() - self._start) / (step - self._first_step) * (self._num_steps - step)
        text = ", ".join(f"{key} {value}" for key, value in shown.items())
        line = f"{self._title}: epoch {epoch}, step {step}/{self._num_steps}, {text}, {left:.0f} s left"
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
