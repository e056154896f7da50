"""Charts as inline SVG. Colours are those of the page's style sheet, so that they follow light and dark."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sast_jax.report.markup import Markup, element

NUM_COLORS = 6
WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 38


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
        label: What it is.
        xs: Places on the horizontal axis.
        ys: Values; the line has gaps where they are not finite.
        color: Number of its colour.
        dash: Number of its dash pattern; 0 is solid.
        markers: Whether its points are drawn.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    dash: int = 0
    markers: bool = False


def percent(value: float) -> str:
    """Formats a fraction, as `85 %`."""
    return f"{100 * value:.4g} %"


def number(value: float) -> str:
    """Formats a number with at most three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers from `low` to `high`, about `count` of them.

    Example:
        >>> ticks(0.31, 0.92)
        [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.8)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def legend(series: Sequence[Series]) -> Markup:
    """Returns the key to lines; equal labels are listed once."""
    entries = {each.label: each for each in series}
    return element("ul", [element("li", _sample(each), label) for label, each in entries.items()], class_="legend")


def _sample(each):
    line = element("line", x1=1, y1=6, x2=25, y2=6, class_=_line_class(each))
    return element("svg", line, _marker(13, 6, each) if each.markers else None, viewBox="0 0 26 12", aria_hidden="true")


def _line_class(each):
    return f"line color{each.color % NUM_COLORS} dash{each.dash % 4}"


def _marker(x, y, each, title=None):
    kind = "open" if each.dash else "full"
    return element(
        "circle",
        element("title", title) if title else None,
        cx=_at(x),
        cy=_at(y),
        r=2.6,
        class_=f"{kind} color{each.color % NUM_COLORS}",
    )


def _at(value):
    return f"{value:.1f}".removesuffix(".0")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = number,
    y_range: tuple[float, float] | None = None,
    x_ticks: dict[float, str] | None = None,
    guides: dict[str, float] | None = None,
) -> Markup:
    """Returns lines over a common axis.

    Args:
        series: At least one line with a finite value.
        title: What is shown, in words, for those who do not see it.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        y_format: How values are written.
        y_range: Lowest and highest value; those of the lines and guides if not given.
        x_ticks: Texts at places of the horizontal axis; round numbers if not given.
        guides: Horizontal lines by their names.
    """
    guides = guides or {}
    xs = np.concatenate([np.asarray(each.xs, float) for each in series])
    ys = np.concatenate([*(np.asarray(each.ys, float) for each in series), list(guides.values())])
    y_low, y_high = y_range or _padded(ys[np.isfinite(ys)])
    x_low, x_high = (xs.min(), xs.max()) if xs.min() < xs.max() else (xs.min() - 0.5, xs.max() + 0.5)
    bottom = HEIGHT - _BOTTOM

    def x_at(value):
        return _LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def y_at(value):
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - _TOP)

    grid, marks, names = [], [], []
    for value in ticks(y_low, y_high):
        grid.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_at(y_at(value)), y2=_at(y_at(value)), class_="grid"))
        grid.append(element("text", y_format(value), x=_LEFT - 6, y=_at(y_at(value) + 3.5), text_anchor="end"))
    whole = [value for value in ticks(x_low, x_high) if value == int(value)]
    for value, text in (x_ticks or {value: f"{value:g}" for value in whole}).items():
        anchor = "end" if x_ticks and value == x_high else "middle"  # A word at the right end would be cut off.
        grid.append(element("text", text, x=_at(x_at(value)), y=bottom + 15, text_anchor=anchor))
    for name, value in guides.items():
        grid.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_at(y_at(value)), y2=_at(y_at(value)), class_="guide"))
        names.append(element("text", name, x=WIDTH - _RIGHT, y=_at(y_at(value) - 4), text_anchor="end", class_="halo"))
    for each in series:
        points = [(x_at(x), y_at(y), x, y) for x, y in zip(each.xs, each.ys, strict=True)]
        shown = [list(group) for finite, group in itertools.groupby(points, lambda p: math.isfinite(p[3])) if finite]
        path = "".join("M" + "L".join(f"{_at(x)} {_at(y)}" for x, y, *_ in group) for group in shown)
        marks.append(element("path", d=path, class_=_line_class(each)))
        if each.markers:
            marks += [_marker(x, y, each, f"{each.label}: {y_format(value)}") for x, y, _, value in itertools.chain(*shown)]
    labels = [
        element("text", x_label, x=(WIDTH + _LEFT - _RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle", class_="axis"),
        element(
            "text", y_label, transform=f"translate(10 {(bottom + _TOP) / 2:g}) rotate(-90)", text_anchor="middle", class_="axis"
        ),
    ]
    return figure(title, WIDTH, HEIGHT, grid, marks, names, labels)


def _padded(values):
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def figure(title: str, width: float, height: float, *content: object, class_: str = "chart") -> Markup:
    """Returns an SVG image with a text for those who do not see it."""
    return element("svg", element("title", title), content, viewBox=f"0 0 {width:g} {height:g}", role="img", class_=class_)


def gap_chart(rows: Sequence[tuple[str, float, float]], *, title: str) -> Markup:
    """Returns a row for each run: its accuracy in surrogate mode (open), in hard mode (full), and the gap between.

    Args:
        rows: Name, surrogate accuracy, hard accuracy.
        title: What is shown, in words.
    """
    width, row_height, left, right = 360, 46, 52, 52
    values = [value for _, *both in rows for value in both]
    low = max(0.0, math.floor((min(values) - 0.03) * 20) / 20)
    high = min(1.0, math.ceil((max(values) + 0.03) * 20) / 20)
    bottom = row_height * len(rows)

    def x_at(value):
        return left + (value - low) / (high - low) * (width - left - right)

    content = []
    for value in ticks(low, high, 4):
        content.append(element("line", x1=_at(x_at(value)), x2=_at(x_at(value)), y1=6, y2=bottom + 2, class_="grid"))
        content.append(element("text", percent(value), x=_at(x_at(value)), y=bottom + 17, text_anchor="middle"))
    for i, (name, surrogate, hard) in enumerate(rows):
        y, color = row_height * i + 32, f"color{i % NUM_COLORS}"
        content.append(element("text", name, x=0, y=y - 14, class_="name halo"))
        content.append(element("line", x1=_at(x_at(surrogate)), x2=_at(x_at(hard)), y1=y, y2=y, class_=f"gap {color}"))
        content.append(element("circle", cx=_at(x_at(surrogate)), cy=y, r=5, class_=f"open {color}"))
        content.append(element("circle", cx=_at(x_at(hard)), cy=y, r=5, class_=f"full {color}"))
        for value, outwards in ((surrogate, surrogate >= hard), (hard, hard > surrogate)):
            anchor, shift = ("start", 9) if outwards else ("end", -9)
            content.append(
                element("text", percent(value), x=_at(x_at(value) + shift), y=y + 3.5, text_anchor=anchor, class_="value")
            )
    return figure(title, width, bottom + 24, content, class_="chart wide")


def grid_chart(values: np.ndarray, *, title: str, cell: tuple[float, float], color: int = 0, levels: int = 6) -> Markup:
    """Returns an array as cells, the darker the larger; 0 is empty.

    Args:
        values: `[rows, columns]` in [0, 1].
        title: What is shown, in words.
        cell: Width and height of a cell.
        color: Number of its colour.
        levels: Number of shades.
    """
    width, height = cell
    shades = np.ceil(np.clip(values, 0, 1) * levels - 1e-6).astype(int)
    paths = [
        element(
            "path",
            d=cells(np.argwhere(shades == shade), cell, gap=0.6),
            class_=f"cell color{color}",
            opacity=f"{shade / levels:.2f}",
        )
        for shade in range(1, levels + 1)
        if (shades == shade).any()
    ]
    size = values.shape[1] * width, values.shape[0] * height
    frame = element("rect", width=size[0], height=size[1], class_="frame")
    return figure(title, *size, frame, paths, class_="raster")


def cells(places: np.ndarray, cell: tuple[float, float], gap: float = 0.0) -> str:
    """Returns the path of filled cells at `[N, 2]` rows and columns."""
    width, height = cell
    inner, down = f"{width - gap:g}", f"{height - gap:g}"
    return "".join(f"M{column * width:g} {row * height:g}h{inner}v{down}h-{inner}z" for row, column in places)


def matrix_chart(counts: np.ndarray, *, title: str, color: int = 0) -> Markup:
    """Returns a confusion matrix `[K, K]`: rows the true class, columns the decision, shaded by share of the row."""
    size, margin = 24, 36
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    content = []
    for row, column in np.argwhere(counts > 0):
        x, y, share = margin + column * size, row * size, shares[row, column]
        content.append(
            element(
                "rect",
                x=x,
                y=y,
                width=size - 1,
                height=size - 1,
                class_=f"cell color{color}",
                opacity=f"{0.12 + 0.88 * share:.2f}",
            )
        )
        style = "on" if share > 0.45 else None
        content.append(
            element("text", int(counts[row, column]), x=x + size / 2 - 0.5, y=y + 16, text_anchor="middle", class_=style)
        )
    end = len(counts) * size
    for k in range(len(counts)):
        content.append(element("text", k, x=margin - 6, y=k * size + 16, text_anchor="end"))
        content.append(element("text", k, x=margin + k * size + size / 2, y=end + 14, text_anchor="middle"))
    content.append(element("text", "decision", x=margin + end / 2, y=end + 30, text_anchor="middle", class_="axis"))
    content.append(
        element("text", "true class", transform=f"translate(13 {end / 2:g}) rotate(-90)", text_anchor="middle", class_="axis")
    )
    return figure(title, margin + end, end + 34, content)


def event_chart(frames: np.ndarray, *, title: str) -> Markup:
    """Returns event frames `[T, H, W, 2]` in a row of small images, a colour for each polarity."""
    num_frames, height, width, _ = frames.shape
    content = []
    for t, frame in enumerate(frames):
        shift = element("rect", width=width, height=height, class_="frame")
        paths = [element("path", d=cells(np.argwhere(frame[..., p]), (1, 1)), class_=f"polarity{p}") for p in (0, 1)]
        content.append(element("g", shift, paths, transform=f"translate({t % 5 * (width + 2)} {t // 5 * (height + 2)})"))
    columns, rows = min(num_frames, 5), math.ceil(num_frames / 5)
    return figure(title, columns * (width + 2) - 2, rows * (height + 2) - 2, content, class_="chart events")
