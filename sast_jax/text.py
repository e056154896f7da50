"""Tables as the terminal shows them."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines whose columns stand below each other, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'>' if column else '<'}{width}}}" for column, width in enumerate(widths))
    return "\n".join(template.format(*row).rstrip() for row in rows)
