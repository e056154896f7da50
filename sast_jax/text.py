"""Text as the terminal shows it: tables, and names that files and folders brought along."""

from collections.abc import Sequence


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
