"""Sections about runs themselves: accuracies, training, one recording, configs."""

import json
from typing import Any

import numpy as np

from sast_jax.config import flatten
from sast_jax.evaluation.robustness import MODES
from sast_jax.report import charts
from sast_jax.report.charts import Series, percent
from sast_jax.report.gather import Example, Report, RunFiles
from sast_jax.report.markup import Markup, element, table
from sast_jax.report.parts import ACCURACIES, Part, captioned, panels, percent_or_dash, points


def find_accuracies(run: RunFiles) -> dict[str, Any] | None:
    """The accuracies of a run in both modes, from wherever they are."""
    if run.results and "hard_accuracy" in run.results:  # A run that only chose between settings has none.
        return run.results
    return {"num_test": run.data["num_test"]} | run.evaluation["transfer"] if "transfer" in run.evaluation else None


def show_gap(parts: list[Part]) -> list[Markup]:
    """Both accuracies of each run, and what they cost."""
    rows = [(part.name, *(part.found[key] for key in ACCURACIES)) for part in parts]
    told = "; ".join(f"{name}: surrogate {percent(surrogate)}, hard {percent(hard)}" for name, surrogate, hard in rows)
    gaps = ", ".join(f"{part.name} {points(part.found['transfer_gap'])}" for part in parts)
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
                    *(percent_or_dash(part.found[key]) for key in ACCURACIES),
                    points(part.found["transfer_gap"]),
                    part.found["num_test"],
                    *spent,
                )
                for part, *spent in zip(parts, *costs, strict=True)
            ],
            caption=f"The number of recordings makes an accuracy uncertain by up to {100 * error:.1f} points (standard error). "
            "A gradient is that of a descent batch.",
        ),
    ]


def show_training(parts: list[Part]) -> list[Markup]:
    """Curves by epoch."""

    def curve(part, key, **style):
        lines = [line for line in part.found if key in line]
        return Series(part.name, [line["epoch"] for line in lines], [line[key] for line in lines], part.color, **style)

    def chart(caption, series, y_label, **options):
        series = [each for each in series if len(each.xs)]
        if not series:
            return None
        chart = charts.line_chart(series, title=f"{caption}, by epoch", x_label="epoch", y_label=y_label, **options)
        return captioned(chart, caption)

    rates = sorted({key for part in parts for line in part.found for key in line if key.startswith("spike_rate_")})
    validation = [
        curve(part, f"validation_{mode}_accuracy", dash=mode == "surrogate", markers=True) for part in parts for mode in MODES
    ]
    return [
        element("p", "Training metrics are those of the batches, at the weights before each step; dashed: surrogate mode."),
        charts.legend([curve(part, "loss") for part in parts]),
        panels(
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


def find_example(report: Report, name: str) -> Example | None:
    """The example of the report, if there is one."""
    return report.example if isinstance(report.example, Example) else None


def show_example(parts: list[Part]) -> list[Markup]:
    """One recording: what each network makes of it, step by step."""
    example, first = parts[0].found, parts[0].name
    why = f"first that {first} decides differently in the two modes" if example.is_disputed else "first"
    frames = _chunks(example.frames, 10)
    what = "frames" if len(frames) == len(example.frames) else "groups of frames"
    pieces = [
        element("p", f"Test recording {example.id}, class {example.label}: the {why}."),
        captioned(
            charts.event_chart(frames, title=f"Events of recording {example.id}, frame after frame"),
            f"Its events in {len(frames)} {what}, a colour for each polarity",
        ),
        table(
            ["run and mode", "decision", "its probability", f"of class {example.label}"],
            [
                (f"{part.name}, {mode}", int(logits.argmax()), percent_or_dash(p.max()), percent_or_dash(p[example.label]))
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
        captioned(
            charts.grid_chart(layer.spikes[mode].T, title=f"Spikes of {layer.name} in {mode} mode", cell=cell, color=part.color),
            f"Spikes, {mode}",
        )
        for mode in MODES
    ]
    traces = [
        captioned(
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
        panels(element("div", rasters, class_="pair"), *traces),
    ]


def _chunks(frames, count):
    """At most `count` frames, of equally many steps but for the last."""
    size = -(-len(frames) // count)
    return np.stack([frames[start : start + size].max(axis=0) for start in range(0, len(frames), size)])


def _softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def show_config(parts: list[Part]) -> list[Markup]:
    """Fields in which the runs differ, all fields, and what the runs were made with."""
    configs = [flatten(part.run.config) for part in parts]
    keys = list(dict.fromkeys(key for config in configs for key in config))

    def value(config, key):
        found = config.get(key, "-")
        return found if isinstance(found, str) else json.dumps(found)

    rows = {key: [value(config, key) for config in configs] for key in keys}
    differing = [(key, *values) for key, values in rows.items() if len(set(values)) > 1]
    names = [part.name for part in parts]
    environment = list(dict.fromkeys(key for part in parts for key in part.run.environment))
    differences = table(["field", *names], differing, caption="Fields in which the runs differ", num_text=len(names) + 1)
    return [
        *([differences] if differing else []),
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
