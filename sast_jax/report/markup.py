"""HTML in which text is always escaped."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None | Iterable[Any]


def element(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """Returns an HTML or SVG element.

    Args:
        name: Tag name.
        children: Elements, text to be escaped, numbers, or lists of these; `None` is nothing.
        attributes: An underscore at the end is dropped, others become hyphens; those of value `None` are left out.
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    closing = "" if name in ("meta", "br") else f"{''.join(map(_text, children))}</{name}>"
    return Markup(f"<{name}{opening}>{closing}")


def _text(child):
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return html.escape(str(child))
    return "".join(map(_text, child))


def table(header: Sequence[str], rows: Iterable[Sequence[Child]], *, caption: str, num_text: int = 1) -> Markup:
    """Returns a table that scrolls in its own box.

    Args:
        header: Titles of the columns.
        rows: Cells, the first of a row being its title.
        caption: What the table shows.
        num_text: Number of first columns that hold text; the others hold numbers and are aligned to the right.
    """

    def cell(name, column, child, **attributes):
        return element(name, child, class_=None if column < num_text else "number", **attributes)

    head = element("tr", [cell("th", i, title, scope="col") for i, title in enumerate(header)])
    body = [
        element("tr", [cell("td", i, child) if i else cell("th", i, child, scope="row") for i, child in enumerate(row)])
        for row in rows
    ]
    box = element(
        "div",
        element("table", element("thead", head), element("tbody", body), aria_label=caption),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )
    return element("figure", element("figcaption", caption), box)
