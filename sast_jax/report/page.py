"""The page: a section for each question, and a line for each that nobody has asked yet."""

import importlib.metadata
import importlib.resources
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sast_jax.errors import UserError
from sast_jax.report import runs, suites
from sast_jax.report.charts import NUM_COLORS
from sast_jax.report.gather import Report
from sast_jax.report.markup import Markup, element
from sast_jax.report.parts import Part


class Section(NamedTuple):
    """A section of the page.

    Attributes:
        title: Its heading.
        find: Takes from the report what the section has to say of a run; `None` if there is nothing.
        show: Its content, of the runs that have it.
        remedy: What to do to have it.
    """

    title: str
    find: Callable[[Report, str], Any]
    show: Callable[[list[Part]], list[Markup]]
    remedy: Callable[[Report], str]

    @property
    def anchor(self) -> str:
        """Its address on the page."""
        return self.title.lower().replace(" ", "-")


def render(report: Report) -> str:
    """Returns the page of a report.

    Raises:
        UserError: If a file of a run does not hold what it must.
    """
    links, content, missing = [], [], []
    for section in SECTIONS:
        found = {name: section.find(report, name) for name in report.runs}
        parts = [
            Part(name, color % NUM_COLORS, report.runs[name], part)
            for color, (name, part) in enumerate(found.items())
            if part is not None
        ]
        if len(parts) < len(found):
            of_whom = f" of {', '.join(name for name, part in found.items() if part is None)}" if parts else ""
            missing.append(element("li", f"{section.title}{of_whom}: ", section.remedy(report)))
        if parts:
            links.append(element("a", section.title, href=f"#{section.anchor}"))
            content.append(element("section", element("h2", section.title, id=section.anchor), _checked(section, parts, report)))
    if missing:
        content.append(element("section", element("h2", "Not in this report"), element("ul", missing)))
    title = f"{report.workdir.resolve().name}: {', '.join(report.runs)}" if len(report.runs) > 1 else next(iter(report.runs))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} - sast_jax"),
        element("link", rel="icon", href="data:,"),  # An empty one, so that no browser asks for it.
        element("style", Markup(importlib.resources.files("sast_jax.report").joinpath("style.css").read_text())),
    )
    top = element("header", element("h1", title), _summary(report), element("nav", links, aria_label="Sections"))
    version = importlib.metadata.version("sast_jax")
    footer = element("footer", element("p", f"Written by sast_jax {version}; this file needs nothing else.", class_="muted"))
    body = element("body", top, element("main", content), footer)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _checked(section, parts, report):
    try:
        return section.show(parts)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        names = ", ".join(part.name for part in parts)
        raise UserError(
            f"report: the files of {names} in {str(report.workdir)!r} do not hold what the section {section.title!r} shows "
            f"({type(error).__name__}: {error}); write them again: {re.sub('<[^>]*>', '', section.remedy(report))}"
        ) from error


def _summary(report):
    run = next(iter(report.runs.values()))
    dataset, network = run.config["dataset"], run.config["network"]
    parts = ", ".join(f"{run.data.get(f'num_{part}', '?')} {part}" for part in ("train", "validation", "test"))
    features = "-".join(map(str, network["features"]))
    return element(
        "p",
        f"Data set {dataset['name']}: {parts} recordings of {dataset['num_time_steps']} frames. Network: {network['kind']} "
        f"{features}, decay {network['decay']}, reset {network['reset']}, {network['family']} surrogate of slope "
        f"{network['slope']}.",
        class_="muted",
    )


def _of_run(find):
    return lambda report, name: find(report.runs[name])


def _of_suite(suite, key=None):
    """Finds a suite's result, if it holds `key`."""

    def find(run):
        found = run.evaluation.get(suite)
        return found if found and (key is None or key in found) else None

    return _of_run(find)


def _command(text):
    return lambda report: element("code", f"sast-jax {text} --workdir={report.workdir}")


def _evaluate(suite):
    return _command(f"evaluate --suite={suite}")


_TRAIN = _command("train --config=FILE")

SECTIONS = [
    Section("What the swap costs", _of_run(runs.find_accuracies), runs.show_gap, _TRAIN),
    Section("Training", _of_run(lambda run: run.metrics or None), runs.show_training, _TRAIN),
    Section("One recording", runs.find_example, runs.show_example, lambda report: str(report.example)),
    Section("Where the gap arises", _of_suite("transfer", "layer_swap"), suites.show_swap, _evaluate("transfer")),
    Section("Calibration", _of_suite("calibration"), suites.show_calibration, _evaluate("calibration")),
    Section("Robustness", _of_suite("robustness"), suites.show_robustness, _evaluate("robustness")),
    Section("Quantisation", _of_suite("quantization"), suites.show_quantization, _evaluate("quantization")),
    Section("Synaptic operations", _of_suite("synops"), suites.show_synops, _evaluate("synops")),
    Section("Theory", _of_run(lambda run: run.theory), suites.show_theory, _command("theory")),
    Section("Config and environment", _of_run(lambda run: run.config), runs.show_config, _TRAIN),
]
