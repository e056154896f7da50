"""Sections about what runs were asked after training: a suite of evaluations each."""

import numpy as np

from sast_jax.evaluation.robustness import MODES
from sast_jax.report import charts
from sast_jax.report.charts import Series, number, percent
from sast_jax.report.markup import Markup, element, table
from sast_jax.report.parts import ACCURACIES, Part, captioned, number_or_dash, panels, percent_or_dash, points


def show_swap(parts: list[Part]) -> list[Markup]:
    """Accuracy as layers go over to hard spikes, and how far the spikes of both modes agree."""
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
            percent_or_dash(row["accuracy"]),
            points(part.found["surrogate_accuracy"] - row["accuracy"]),
        )
        for part in parts
        for row in part.found["layer_swap"]["single"]
    ]
    agreement = [
        (
            f"{part.name}, {name}",
            *(percent_or_dash(layer[key]) for key in ("surrogate_activation", "hard_rate")),
            number_or_dash(layer["count_correlation"]),
            number_or_dash(layer["count_difference"]),
        )
        for part in parts
        for name, layer in part.found["agreement"]["layers"].items()
    ]
    same = ", ".join(f"{part.name} {percent_or_dash(part.found['agreement']['decisions'])}" for part in parts)
    return [
        element(
            "p",
            f"Layers go over to hard spikes one after the other, the first first. Recordings that keep their decision: {same}.",
        ),
        charts.legend(prefixes),
        panels(
            captioned(
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
        element("details", element("summary", "Confusion matrices"), panels(*_confusions(parts))),
    ]


def _confusions(parts):
    for part in parts:
        for mode in MODES:
            caption = f"{part.name}, {mode}: numbers of test recordings"
            yield captioned(
                charts.matrix_chart(np.array(part.found["confusion"][mode]), title=caption, color=part.color), caption
            )


def show_calibration(parts: list[Part]) -> list[Markup]:
    """What other thresholds and gains achieve."""

    def cells(values):
        return (
            percent_or_dash(values["accuracy"]),
            percent_or_dash(values.get("gap_removed")),
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


def _both_modes(part, xs, values, markers=True):
    """Two lines of a run: surrogate mode dashed, hard mode solid."""
    return [
        Series(f"{part.name}, {mode}", xs, values[f"{mode}_accuracy"], part.color, mode == "surrogate", markers) for mode in MODES
    ]


def show_robustness(parts: list[Part]) -> list[Markup]:
    """Accuracy by corruption and severity."""
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
        panels(
            *(
                captioned(
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
                (_words(kind), *(percent_or_dash(part.found["area"][kind][mode]) for part in parts for mode in MODES))
                for kind in [*kinds, "mean"]
            ],
            caption=f"Area under the curve: mean accuracy over severity, {parts[0].found['num_test']} test recordings",
        ),
    ]


def _words(name):
    return name.replace("_", " ")


def show_quantization(parts: list[Part]) -> list[Markup]:
    """Inference in integers."""

    def cells(found, agreement=None, reference=None):
        same = reference and f"{'equal' if reference['equal'] else 'DIFFERENT'} on {reference['num_compared']}"
        return (
            percent_or_dash(found["accuracy"]),
            percent_or_dash(agreement),
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


def show_synops(parts: list[Part]) -> list[Markup]:
    """Operations per recording."""
    keys = ("effective_acs", "effective_macs", "event_acs", "dense")
    rows = []
    for part in parts:
        for name, layer in part.found["layers"].items():
            rows.append((f"{part.name}, {name}", *(number(layer[key]) for key in keys), percent_or_dash(layer["spike_rate"])))
        sparsity = part.found["activation_sparsity"]
        rows.append(
            (
                f"{part.name}, total",
                *(number(part.found[key]) for key in keys),
                percent_or_dash(None if sparsity is None else 1 - sparsity),
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


def show_theory(parts: list[Part]) -> list[Markup]:
    """Statements with what they bound and what is measured."""
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
                number_or_dash(each["measured"]),
                number_or_dash(each["bound"]) + (" (vacuous)" if each["vacuous"] else ""),
                number_or_dash(each["tightness"]),
            )
            for each in part.found["statements"]
        ]
        header = ["layer", "statement", "assumption", "holds", "measured", "bound", "measured / bound"]
        caption = f"{part.name}: measured on {part.found['num_recordings']} {part.found['recordings']} recordings"
        pieces.append(table(header, rows, caption=caption, num_text=4))
    return pieces
