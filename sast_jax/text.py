"""What is printed: tables, names that files and folders brought along, and streams that may lose their reader."""

import os
from collections.abc import Sequence
from typing import Any, TextIO


def printable(text: str) -> str:
    r"""Returns a text in which what no terminal should be sent stands as an escape: control characters, bytes of no encoding.

    Example:
        >>> print(printable("a\x1b[2Jb\udcffé"))
        a\x1b[2Jb\xffé
    """
    return "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # Python's form of a byte that is not UTF-8.
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def printable_lines(text: str) -> str:
    """Returns `printable` of each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def align(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines whose columns stand below each other, the first to the left, the others to the right."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    template = "  ".join(f"{{:{'>' if column else '<'}{width}}}" for column, width in enumerate(widths))
    return "\n".join(template.format(*row).rstrip() for row in shown)


class Output:
    """A text stream that nothing can fail on: once it cannot be written (closed pipe, full disk), what is written is dropped.

    A command prints its progress and its results, and both are on disk as well. So a lost reader is no reason to stop training.
    """

    def __init__(self, stream: TextIO | None):
        """Takes the place of a stream, or of one that was closed before Python began, which is `None`."""
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115
        self._stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]  # A folder's name may not be text.

    def __getattr__(self, name: str) -> Any:
        """Everything but writing is the stream's own."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Hands on what was written, or drops it."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        # The file is replaced below the stream, so that what is still in its buffer goes nowhere, too, when Python ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
