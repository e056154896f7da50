"""The page: a section for each question, and a line for each that nobody has asked yet."""

import importlib.metadata
import importlib.resources
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sast_jax.config import flatten
from sast_jax.errors import UserError
from sast_jax.evaluation.robustness import MODES
from sast_jax.report import charts
from sast_jax.report.charts import NUM_COLORS, Series, number, percent
from sast_jax.report.gather import Example, Report, RunFiles
from sast_jax.report.markup import Markup, element, table

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
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        names = ", ".join(part.name for part in parts)
        raise UserError(
            f"report: the files of {names} in {str(report.workdir)!r} do not hold what the section {section.title!r} shows "
            f"({type(error).__name__}: {error}); write them again: {section.remedy(report)}"
        ) from error


def _summary(report):
    run = next(iter(report.runs.values()))
    dataset, network = run.config["dataset"], run.config["network"]
    parts = ", ".join(f"{run.data[f'num_{part}']} {part}" for part in ("train", "validation", "test"))
    features = "-".join(map(str, network["features"]))
    return element(
        "p",
        f"Data set {dataset['name']}: {parts} recordings of {dataset['num_time_steps']} frames. Network: {network['kind']} "
        f"{features}, decay {network['decay']}, reset {network['reset']}, {network['family']} surrogate of slope "
        f"{network['slope']}.",
        class_="muted",
    )


def _captioned(chart, caption):
    return element("figure", element("figcaption", caption), chart)


def _panels(*figures):
    return element("div", figures, class_="panels")


def _points(fraction):
    return f"{100 * fraction:+.1f}"


def _percent(fraction):
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _number(value):
    return "-" if value is None else number(value)


def _both_modes(part, xs, values, markers=True):
    """Two lines of a run: surrogate mode dashed, hard mode solid."""
    return [
        Series(f"{part.name}, {mode}", xs, values[f"{mode}_accuracy"], part.color, mode == "surrogate", markers) for mode in MODES
    ]


# What the swap costs.


def _find_accuracies(run):
    return run.results or (
        {"num_test": run.data["num_test"]} | run.evaluation["transfer"] if "transfer" in run.evaluation else None
    )


def _show_gap(parts):
    rows = [(part.name, *(part.found[key] for key in ACCURACIES)) for part in parts]
    told = "; ".join(f"{name}: surrogate {percent(surrogate)}, hard {percent(hard)}" for name, surrogate, hard in rows)
    gaps = ", ".join(f"{part.name} {_points(part.found['transfer_gap'])}" for part in parts)
    error = max(np.sqrt(p * (1 - p) / part.found["num_test"]) for part, (_, *both) in zip(parts, rows, strict=True) for p in both)

    def cost(key):
        values = [part.found.get(key) for part in parts]
        ratios = ["" if value is values[0] or not (value and values[0]) else f" ({value / values[0]:.2f}x)" for value in values]
        return ["-" if value is None else f"{value:,.0f}{ratio}" for value, ratio in zip(values, ratios, strict=True)]

    costs = [cost(key) for key in ("num_gradient_evaluations", "wall_time_seconds")]
    return [
        element(
            "p",
            f"Transfer gap, in points of test accuracy: {gaps}. Equal weights, once with smooth spikes (open circle), once with "
            "hard spikes, as deployed (full circle):",
        ),
        charts.gap_chart(rows, title=f"Test accuracy. {told}"),
        table(
            ["run", "surrogate", "hard", "gap, points", "test recordings", "gradients", "seconds"],
            [
                (
                    part.name,
                    *(_percent(part.found[key]) for key in ACCURACIES),
                    _points(part.found["transfer_gap"]),
                    part.found["num_test"],
                    *spent,
                )
                for part, *spent in zip(parts, *costs, strict=True)
            ],
            caption=f"The number of recordings makes an accuracy uncertain by up to {100 * error:.1f} points (standard error). "
            "A gradient is that of a descent batch.",
        ),
    ]


# Training.


def _show_training(parts):
    def curve(part, key, **style):
        lines = [line for line in part.found if key in line]
        return Series(part.name, [line["epoch"] for line in lines], [line[key] for line in lines], part.color, **style)

    def chart(caption, series, y_label, **options):
        series = [each for each in series if len(each.xs)]
        if not series:
            return None
        chart = charts.line_chart(series, title=f"{caption}, by epoch", x_label="epoch", y_label=y_label, **options)
        return _captioned(chart, caption)

    rates = sorted({key for part in parts for line in part.found for key in line if key.startswith("spike_rate_")})
    validation = [
        curve(part, f"validation_{mode}_accuracy", dash=mode == "surrogate", markers=True) for part in parts for mode in MODES
    ]
    return [
        element("p", "Training metrics are those of the batches, at the weights before each step; dashed: surrogate mode."),
        charts.legend([curve(part, "loss") for part in parts]),
        _panels(
            chart("Training loss", [curve(part, "loss") for part in parts], "cross-entropy"),
            chart("Validation accuracy: hard (solid) and surrogate (dashed)", validation, "accuracy", y_format=percent),
            chart("Norm of the gradient", [curve(part, "gradient_norm") for part in parts], "norm"),
            *(
                chart(
                    f"Mean output of the neurons of layer {key.removeprefix('spike_rate_')}",
                    [curve(part, key) for part in parts],
                    "per step",
                )
                for key in rates
            ),
        ),
    ]


# One recording.


def _find_example(report, name):
    return report.example if isinstance(report.example, Example) else None


def _show_example(parts):
    example, first = parts[0].found, parts[0].name
    why = f"first that {first} decides differently in the two modes" if example.is_disputed else "first"
    frames = _chunks(example.frames, 10)
    what = "frames" if len(frames) == len(example.frames) else "groups of frames"
    pieces = [
        element("p", f"Test recording {example.id}, class {example.label}: the {why}."),
        _captioned(
            charts.event_chart(frames, title=f"Events of recording {example.id}, frame after frame"),
            f"Its events in {len(frames)} {what}, a colour for each polarity",
        ),
        table(
            ["run and mode", "decision", "its probability", f"of class {example.label}"],
            [
                (f"{part.name}, {mode}", int(logits.argmax()), _percent(p.max()), _percent(p[example.label]))
                for part in parts
                for mode, logits in example.logits[part.name].items()
                for p in [_softmax(logits)]
            ],
            caption="What the networks make of it",
        ),
        element(
            "p",
            "Below, spikes over time in both modes, a row for each of some neurons, those most active in hard mode first; and "
            "the potentials of two of these, in hard mode (solid) and in surrogate mode (dashed).",
        ),
    ]
    for part in parts:
        pieces.append(element("h3", part.name))
        for layer in example.layers[part.name]:
            pieces += _show_layer(part, layer)
    return pieces


def _show_layer(part, layer):
    num_steps, num_shown = layer.spikes["hard"].shape
    cell, steps = (160 / num_steps, 128 / num_shown), range(1, num_steps + 1)
    rasters = [
        _captioned(
            charts.grid_chart(layer.spikes[mode].T, title=f"Spikes of {layer.name} in {mode} mode", cell=cell, color=part.color),
            f"Spikes, {mode}",
        )
        for mode in MODES
    ]
    traces = [
        _captioned(
            charts.line_chart(
                [
                    Series(mode, steps, layer.potentials[mode][:, i], part.color, mode == "surrogate", num_steps <= 30)
                    for mode in MODES
                ],
                title=f"Potential of {which} active neuron of {layer.name} in both modes",
                x_label="time step",
                y_label="potential",
                guides={"threshold": part.run.config["network"]["threshold"]},
            ),
            f"Potential of {which} active neuron",
        )
        for i, which in enumerate(("a more", "a less"))
    ]
    share = f"{layer.num_active:,} of {layer.num_neurons:,} neurons spike in hard mode"
    return [
        element("p", f"{layer.name}: {share}; {num_shown} of them:", class_="muted"),
        _panels(element("div", rasters, class_="pair"), *traces),
    ]


def _chunks(frames, count):
    """At most `count` frames, of equally many steps but for the last."""
    size = -(-len(frames) // count)
    return np.stack([frames[start : start + size].max(axis=0) for start in range(0, len(frames), size)])


def _softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


# Where the gap arises.


def _show_swap(parts):
    layers = [list(part.found["agreement"]["layers"]) for part in parts]
    longest = max(layers, key=len)
    texts = {0.0: "none"} | {float(i + 1): f"+ {name}" for i, name in enumerate(longest)}
    prefixes = [
        Series(
            part.name,
            range(len(part.found["layer_swap"]["prefix"])),
            [row["accuracy"] for row in part.found["layer_swap"]["prefix"]],
            part.color,
            markers=True,
        )
        for part in parts
    ]
    singles = [
        (
            f"{part.name}, {', '.join(row['hard'])}",
            _percent(row["accuracy"]),
            _points(part.found["surrogate_accuracy"] - row["accuracy"]),
        )
        for part in parts
        for row in part.found["layer_swap"]["single"]
    ]
    agreement = [
        (
            f"{part.name}, {name}",
            *(_percent(layer[key]) for key in ("surrogate_activation", "hard_rate")),
            _number(layer["count_correlation"]),
            _number(layer["count_difference"]),
        )
        for part in parts
        for name, layer in part.found["agreement"]["layers"].items()
    ]
    same = ", ".join(f"{part.name} {_percent(part.found['agreement']['decisions'])}" for part in parts)
    return [
        element(
            "p",
            f"Layers go over to hard spikes one after the other, the first first. Recordings that keep their decision: {same}.",
        ),
        charts.legend(prefixes),
        _panels(
            _captioned(
                charts.line_chart(
                    prefixes,
                    title="Test accuracy with the first layers in hard mode. "
                    + "; ".join(f"{each.label}: {', '.join(map(percent, each.ys))}" for each in prefixes),
                    x_label="layers in hard mode",
                    y_label="test accuracy",
                    y_format=percent,
                    x_ticks=texts,
                ),
                "Test accuracy with the first layers in hard mode",
            ),
            table(["run, layer", "accuracy", "lost"], singles, caption="One layer alone in hard mode, and the points lost to it"),
        ),
        table(
            ["run, layer", "surrogate output", "hard spike rate", "correlation", "difference"],
            agreement,
            caption="Mean output per neuron and step in both modes; correlation and mean difference of its sums over time",
        ),
        element("details", element("summary", "Confusion matrices"), _panels(*_confusions(parts))),
    ]


def _confusions(parts):
    for part in parts:
        for mode in MODES:
            caption = f"{part.name}, {mode}: numbers of test recordings"
            yield _captioned(
                charts.matrix_chart(np.array(part.found["confusion"][mode]), title=caption, color=part.color), caption
            )


# What the cheap fix does.


def _show_calibration(parts):
    def cells(values):
        return (
            _percent(values["accuracy"]),
            _percent(values.get("gap_removed")),
            *(number(values[key]) for key in ("loss", "ece", "temperature", "scaled_loss", "scaled_ece")),
        )

    rows = []
    for part in parts:
        rows.append((part.name, "surrogate mode", *cells(part.found["surrogate"])))
        for name, values in part.found["methods"].items():
            method = "swap alone" if name == "none" else name.replace("_", " by ")
            rows.append((part.name, method + (" (chosen)" if name == part.found["chosen"] else ""), *cells(values)))
    one = parts[0].found
    return [
        element(
            "p",
            "What other thresholds or gains of the hard network achieve on the same weights: the cheap fix that training has to "
            "beat. The method of the lowest calibration loss is chosen.",
        ),
        table(
            ["run", "method", "accuracy", "gap removed", "loss", "ECE", "temperature", "loss, scaled", "ECE, scaled"],
            rows,
            caption=f"Fitted on {one['num_calibration']} {one['split']} recordings, measured on {one['num_test']} others. ECE: "
            f"expected calibration error in {one['num_bins']} bins; scaled: logits divided by the temperature.",
            num_text=2,
        ),
    ]


# What remains under corruption.


def _show_robustness(parts):
    kinds = list(parts[0].found["corruptions"])
    severities = [0, *parts[0].found["severities"]]
    values = [part.found["clean"][key] for part in parts for key in ACCURACIES] + [
        value for part in parts for each in part.found["corruptions"].values() for key in ACCURACIES for value in each[key]
    ]
    y_range = max(0.0, min(values) - 0.04), min(1.0, max(values) + 0.04)

    def series(kind, markers=True):
        return [
            line
            for part in parts
            for line in _both_modes(
                part,
                severities,
                {key: [part.found["clean"][key], *part.found["corruptions"][kind][key]] for key in ACCURACIES},
                markers,
            )
        ]

    return [
        element(
            "p", "Test accuracy when the events are corrupted, by severity; 0 is clean. Solid: hard mode, dashed: surrogate mode."
        ),
        charts.legend(series(kinds[0])),
        _panels(
            *(
                _captioned(
                    charts.line_chart(
                        series(kind),
                        title=f"Test accuracy under {_words(kind)}",
                        x_label="severity",
                        y_label="test accuracy",
                        y_format=percent,
                        y_range=y_range,
                    ),
                    _words(kind).capitalize(),
                )
                for kind in kinds
            )
        ),
        table(
            ["corruption", *(f"{part.name}, {mode}" for part in parts for mode in MODES)],
            [
                (_words(kind), *(_percent(part.found["area"][kind][mode]) for part in parts for mode in MODES))
                for kind in [*kinds, "mean"]
            ],
            caption=f"Area under the curve: mean accuracy over severity, {parts[0].found['num_test']} test recordings",
        ),
    ]


def _words(name):
    return name.replace("_", " ")


# On a chip.


def _show_quantization(parts):
    def cells(found, agreement=None, reference=None):
        same = reference and f"{'equal' if reference['equal'] else 'DIFFERENT'} on {reference['num_compared']}"
        return (
            _percent(found["accuracy"]),
            _percent(agreement),
            number(found["synops"]["event_acs"]),
            f"{found['memory']['total'] / 1000:,.1f}",
            same or "-",
        )

    rows, widths = [], set()
    for part in parts:
        rows.append((f"{part.name}, float32", "-", "-", *cells(part.found["float"])))
        for row in part.found["configurations"]:
            form = f"{part.name}, INT{row['weight_bits']}", f"per {row['granularity']}", row["decay_form"]
            rows.append((*form, *cells(row, row["agreement"], row["reference"])))
            widths.add(row["potential_bits"])
    potentials = ", ".join(map(str, sorted(widths)))
    return [
        element(
            "p", "Inference of the hard network in integers: weights, thresholds and potentials in fixed point, decay by shifts."
        ),
        table(
            ["run, weights", "scale", "decay", "accuracy", "decided as float", "accumulations", "memory, kB", "reference"],
            rows,
            caption=f"{parts[0].found['num_test']} test recordings; potentials of {potentials} bits. Accumulations: per "
            "recording, each spike an event. Reference: recordings compared bit for bit with integer-only NumPy.",
            num_text=3,
        ),
    ]


def _show_synops(parts):
    keys = ("effective_acs", "effective_macs", "event_acs", "dense")
    rows = []
    for part in parts:
        for name, layer in part.found["layers"].items():
            rows.append((f"{part.name}, {name}", *(number(layer[key]) for key in keys), _percent(layer["spike_rate"])))
        sparsity = part.found["activation_sparsity"]
        rows.append(
            (
                f"{part.name}, total",
                *(number(part.found[key]) for key in keys),
                _percent(None if sparsity is None else 1 - sparsity),
            )
        )
    return [
        table(
            ["run, layer", "effective ACs", "effective MACs", "ACs, event by event", "dense", "spike rate"],
            rows,
            caption="Of the hard network, per recording, as NeuroBench counts them; mean over "
            f"{parts[0].found['num_test']} test recordings",
        )
    ]


# What the theory says.


def _show_theory(parts):
    pieces = [
        element(
            "p",
            "Which assumptions hold, and how bounds compare with what is measured. A vacuous bound says what is known anyway.",
        )
    ]
    for part in parts:
        rows = [
            (
                each["layer"],
                each["statement"],
                each["assumption"],
                "yes" if each["holds"] else "no",
                _number(each["measured"]),
                _number(each["bound"]) + (" (vacuous)" if each["vacuous"] else ""),
                _number(each["tightness"]),
            )
            for each in part.found["statements"]
        ]
        header = ["layer", "statement", "assumption", "holds", "measured", "bound", "measured / bound"]
        caption = f"{part.name}: measured on {part.found['num_recordings']} {part.found['recordings']} recordings"
        pieces.append(table(header, rows, caption=caption, num_text=4))
    return pieces


# How it was made.


def _show_config(parts):
    configs = [flatten(part.run.config) for part in parts]
    keys = list(dict.fromkeys(key for config in configs for key in config))

    def value(config, key):
        found = config.get(key, "-")
        return found if isinstance(found, str) else json.dumps(found)

    rows = {key: [value(config, key) for config in configs] for key in keys}
    differing = [(key, *values) for key, values in rows.items() if len(set(values)) > 1]
    names = [part.name for part in parts]
    environment = list(dict.fromkeys(key for part in parts for key in part.run.environment))
    return [
        table(["field", *names], differing, caption="Fields in which the runs differ", num_text=len(names) + 1)
        if differing
        else None,
        element(
            "details",
            element("summary", "All fields"),
            table(["field", *names], [(key, *values) for key, values in rows.items()], caption="Config", num_text=len(names) + 1),
        ),
        element(
            "details",
            element("summary", "Environment and data"),
            table(
                ["", *names],
                [
                    *((key, *(part.run.environment.get(key, "-") for part in parts)) for key in environment),
                    ("data checksum", *(part.run.data["checksum"][:16] for part in parts)),
                ],
                caption="What the runs were made with",
                num_text=len(names) + 1,
            ),
        ),
    ]


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
    Section("What the swap costs", _of_run(_find_accuracies), _show_gap, _TRAIN),
    Section("Training", _of_run(lambda run: run.metrics or None), _show_training, _TRAIN),
    Section("One recording", _find_example, _show_example, lambda report: str(report.example)),
    Section("Where the gap arises", _of_suite("transfer", "layer_swap"), _show_swap, _evaluate("transfer")),
    Section("Calibration", _of_suite("calibration"), _show_calibration, _evaluate("calibration")),
    Section("Robustness", _of_suite("robustness"), _show_robustness, _evaluate("robustness")),
    Section("Quantisation", _of_suite("quantization"), _show_quantization, _evaluate("quantization")),
    Section("Synaptic operations", _of_suite("synops"), _show_synops, _evaluate("synops")),
    Section("Theory", _of_run(lambda run: run.theory), _show_theory, _command("theory")),
    Section("Config and environment", _of_run(lambda run: run.config), _show_config, _TRAIN),
]
