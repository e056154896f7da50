"""What the sections of the page have in common."""

from typing import Any, NamedTuple

from sast_jax.evaluation.robustness import MODES
from sast_jax.report.charts import number
from sast_jax.report.gather import RunFiles
from sast_jax.report.markup import Markup, element

ACCURACIES = tuple(f"{mode}_accuracy" for mode in MODES)


class Part(NamedTuple):
    """What one run has to say in a section.

    Attributes:
        name: Name of the run.
        color: Number of its colour.
        run: All its files.
        found: The part of them that the section is about.
    """

    name: str
    color: int
    run: RunFiles
    found: Any


def captioned(chart: Markup, caption: str) -> Markup:
    """Returns a chart under its caption."""
    return element("figure", element("figcaption", caption), chart)


def panels(*figures: Markup | None) -> Markup:
    """Returns figures side by side where there is room."""
    return element("div", figures, class_="panels")


def points(fraction: float) -> str:
    """Formats a difference of fractions in points."""
    return f"{100 * fraction:+.1f}"


def percent_or_dash(fraction: float | None) -> str:
    """Formats a fraction to a tenth of a per cent."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def number_or_dash(value: float | None) -> str:
    """As `number`."""
    return "-" if value is None else number(value)
