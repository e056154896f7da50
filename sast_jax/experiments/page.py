"""The results of a study as a page: Markdown, figures, and findings that are composed from the numbers by rules."""

import itertools
from pathlib import Path
from typing import Any

from sast_jax.errors import UserError
from sast_jax.experiments.comparison import CHEAP, recommend
from sast_jax.experiments.statistics import paired_test
from sast_jax.experiments.study import BASELINE
from sast_jax.files import atomic_write

PAGE = "results.md"
FIGURES = {
    "accuracy.png": "Test accuracy of every seed in both modes, joined per run; bars are means. Right: gradient evaluations and "
    "time, as ratios to the baseline.",
    "differences.png": "Differences to the first control of each, seed by seed: mean and two standard errors; "
    "grey if they reach zero.",
}

_NOTICEABLE = 0.02  # Share by which costs may differ and still be called equal.


def _pm(summary: dict[str, Any], template: str = "{:.1f}") -> str:
    error = summary["standard_error"]
    return template.format(summary["mean"]) + ("" if error is None else f" ± {error:.1f}")


def _values(summary: dict[str, Any]) -> str:
    return f"<br><sub>{', '.join(f'{value:.1f}' for value in summary['values'])}</sub>"


def _join(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def find(results: dict[str, Any]) -> list[str]:
    """Returns what the numbers say, one sentence or two each.

    Nothing is called higher, lower or smaller unless the mean difference per seed lies beyond two standard errors of it; what
    shows no such difference, or the opposite one, is named as well.

    Args:
        results: As `results.json` of a study holds them.
    """
    methods = results["methods"]
    gap = methods[BASELINE]["gap"]
    clear = gap["standard_error"] is not None and abs(gap["mean"]) > 2 * gap["standard_error"]
    if clear:
        what = "loses" if gap["mean"] > 0 else "gains"
        sentences = [
            f"On the swap to hard spikes the baseline {what} {abs(gap['mean']):.1f} ± {gap['standard_error']:.1f} points."
        ]
    else:
        sentences = [f"The baseline shows no gap that these seeds can tell from zero: {_pm(gap)} points."]
    sentences += [
        _sort_out(methods, "hard", "Accuracy with hard spikes is higher than the first control's", "lower"),
        _sort_out(methods, "gap_size", "The size of the gap, whatever its sign, is lower than that control's", "higher", sign=-1),
    ]
    bought = [
        row["title"]
        for row in methods.values()
        if row["comparisons"] and _is_clear(row, "gap_size", -1) and not _is_clear(row, "hard", 1)
    ]
    if bought:
        sentences.append(f"Of the smaller gaps, these come without a higher accuracy with hard spikes: {_join(bought)}.")
    unequal = [
        f"{row['title']} ({row['comparisons'][0]['gradients_ratio']:.3g}x)"
        for row in methods.values()
        if row["comparisons"] and not _is_matched(row["comparisons"][0])
    ]
    if unequal:
        sentences.append(f"Not at equal gradient evaluations with that control: {_join(unequal)}.")
    sentences += [_compare_best(methods), *_recommend(methods), *_compare_further(methods)]
    num_seeds, num_comparisons = len(results["seeds"]), sum(len(row["comparisons"]) for row in methods.values())
    sentences.append(
        f"With {num_seeds} seeds the smallest p that the exact paired test can give is {2.0 ** (1 - num_seeds):.2g}, and the "
        f"{num_comparisons} comparisons are not corrected for their number: two standard errors of {num_seeds} seeds are an "
        "indication, not a proof."
    )
    return sentences


def _is_matched(comparison):
    return abs(comparison["gradients_ratio"] - 1) <= _NOTICEABLE


def _is_clear(row, what, sign):
    test = row["comparisons"][0][what]
    return test["clear"] and sign * test["mean"] > 0


def _sort_out(methods, what, heading, opposite, sign=1):
    compared = [row for row in methods.values() if row["comparisons"]]

    def named(chosen):
        return _join([f"{row['title']} ({_pm(row['comparisons'][0][what], '{:+.1f}')})" for row in chosen])

    better = [row for row in compared if _is_clear(row, what, sign)]
    worse = [row for row in compared if _is_clear(row, what, -sign)]
    same = [row for row in compared if not row["comparisons"][0][what]["clear"]]
    return f"{heading} with: {named(better)}. It is {opposite} with: {named(worse)}. No clear difference: {named(same)}."


def _compare_best(methods):
    best = max(methods, key=lambda name: methods[name]["hard"]["mean"])
    values = methods[best]["hard"]["values"]
    tied = [
        row["title"] for name, row in methods.items() if name != best and not paired_test(values, row["hard"]["values"])["clear"]
    ]
    row = methods[best]
    return (
        f"The highest mean accuracy with hard spikes is that of {row['title']}, {_pm(row['hard'])} % at "
        f"{row['gradients_ratio']:.3g}x the gradients of the baseline. Not clearly below it: {_join(tied)}."
    )


def _recommend(methods):
    """A sentence on the method to take, chosen without the test part."""
    if not (name := recommend(methods)):
        return
    row = methods[name]
    modes = {"surrogate": "smooth", "hard": "hard"}
    best, mode = max(itertools.product(methods.values(), modes), key=lambda pair: pair[0][pair[1]]["mean"])
    test = paired_test(row["hard"]["values"], best[mode]["values"])
    if best is row and mode == "hard":
        rank = ", the highest mean of any method in any mode there"
    else:
        rank = (
            f"; the highest mean of any method in any mode, there, is that of {best['title']} with {modes[mode]} spikes, "
            f"{_pm(best[mode])} %: a difference of {_pm(test, '{:+.1f}')} points, {'' if test['clear'] else 'not '}clear"
        )
    yield (
        f"Of the trained methods that take at most {CHEAP:g} times the baseline's gradients, the best with hard spikes on the "
        f"validation part, mean over the tested seeds, is {row['title']} ({row['validation_hard']['mean']:.1f} %). On the test "
        f"part it reaches {_pm(row['hard'])} %{rank}."
    )


def _compare_further(methods):
    """Sentences on the comparisons of SAST beyond the matched one."""
    row = methods.get("sast", {"comparisons": []})
    for comparison in row["comparisons"][1:]:
        test = comparison["hard"]
        verdict = ("higher" if test["mean"] > 0 else "lower") if test["clear"] else "not clearly different"
        yield (
            f"Against {methods[comparison['control']]['title']}, at {comparison['gradients_ratio']:.3g}x its gradients, the "
            f"accuracy of {row['title']} with hard spikes is {verdict}: {_pm(test, '{:+.1f}')} points, p = {test['p']:.2g}."
        )


def render(results: dict[str, Any]) -> str:
    """Returns the page as Markdown; figures lie beside it.

    Args:
        results: As `results.json` of a study holds them.
    """
    methods, data, environment = results["methods"], results["data"], results["environment"]
    is_reported = any(row["reported"] for row in methods.values())
    head = ["training", "surrogate accuracy, %", "hard-spike accuracy, %", "transfer gap, points", "gradients", "time"]
    rows = [
        [
            f"{row['title']}{_selected(row)}",
            *(f"{_pm(row[what])} {_values(row[what])}" for what in ("surrogate", "hard", "gap")),
            f"{row['gradients_ratio']:.3g}x",
            f"{row['time_ratio']:.2f}x",
            *([row["reported"] or "-"] if is_reported else []),
        ]
        for row in methods.values()
    ]
    differences = [
        [
            row["title"],
            f"{methods[comparison['control']]['title']}{' (matched)' if number == 0 and _is_matched(comparison) else ''}",
            *(
                f"{_pm(comparison[what], '{:+.1f}')} (p {comparison[what]['p']:.2g})"
                for what in ("hard", "gap_size", "surrogate")
            ),
            f"{comparison['gradients_ratio']:.3g}x",
            f"{comparison['time_ratio']:.2f}x",
        ]
        for row in methods.values()
        for number, comparison in enumerate(row["comparisons"])
    ]
    chosen = [
        [methods[name]["title"], _label(row["values"]), *(_selection_cell(row, mode) for mode in ("hard", "surrogate")), mark]
        for name, rows_of_one in results["selection"].items()
        for row, mark in zip(rows_of_one, ["selected"] + [""] * len(rows_of_one), strict=False)
        if "hard" in row
    ]
    seeds = ", ".join(map(str, results["seeds"]))
    folds = (
        f" Cross-validation: each seed is tested on another of {results['folds']} folds of about {data['num_test']} recordings. "
        "Runs share most of their training recordings, so that the errors do not cover the choice of these; and settings are "
        "selected by runs that were trained on recordings which other folds test, though never by an accuracy on them."
        if results.get("folds")
        else ""
    )
    cores = results.get("num_cores", [environment["num_cores"]])
    machine = f"{' or '.join(map(str, cores))} {environment['device'].upper()} core{'s' * (max(cores) > 1)}"
    mixed = " Runs had different numbers of cores, so that ratios of their times say little." if len(cores) > 1 else ""
    overrides = f" Set by hand: {', '.join(f'`{text}`' for text in results['overrides'])}." if results["overrides"] else ""
    parts = [
        f"# {results['name']}",
        results["question"],
        "## Findings",
        "Composed from the numbers by rules: nothing is claimed within two standard errors of a difference per seed. The first "
        "control of each method is the first one it is compared with under Differences.",
        "\n".join(f"- {sentence}" for sentence in find(results)),
        "## Results",
        *(f"![{text}]({name})" for name, text in FIGURES.items()),
        _table([*head, *(["reported by the papers for their own network, not measured here"] if is_reported else [])], rows),
        f"Mean ± standard error over seeds {seeds}, listed below it. {data['num_train']} training, {data['num_validation']} "
        f"validation and {data['num_test']} test recordings.{folds} Gradients: evaluations of a batch's gradient, as a ratio to "
        f"the baseline's {methods[BASELINE]['gradient_evaluations']['mean']:g}; calibration takes none of the weights. Time: "
        f"median ratio to the baseline of the same seed, {methods[BASELINE]['seconds']['mean']:.0f} s on {machine}; compilation "
        f"and validation are included, and calibration has all cores.{mixed}{overrides}",
        "## Differences",
        _table(["training", "against", "hard spikes", "size of the gap", "surrogate", "gradients", "time"], differences),
        "Mean ± standard error of the differences per seed, in points, and p of the exact sign-flip test. *Matched*: of equal "
        "gradient evaluations. The last columns are the costs as ratios to the control's.",
        "## Selection",
        _table(["training", "values", "hard spikes, %", "surrogate, %", ""], chosen)
        if chosen
        else "Nothing was selected: there was one value each.",
        f"Validation accuracy of seeds {', '.join(map(str, results['selection_seeds']))}, none of which is tested; the highest "
        "mean with hard spikes is taken, the first of equals. These runs are not evaluated on the test part.",
        "## Methods",
        "\n".join(f"- **{row['title']}**: {row['reference']}.{_calibrations(row)}" for row in methods.values()),
    ]
    return "\n\n".join(parts) + "\n"


def _label(values):
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())


def _selected(row):
    return f" <br><sub>{_label(row['selected'])}</sub>" if row["selected"] else ""


def _calibrations(row):
    return f" Taken, by seed: {', '.join(row['calibration'])}." if "calibration" in row else ""


def _selection_cell(row, mode):
    values = ", ".join("diverged" if value is None else f"{value:.1f}" for value in row[mode])
    return values if row[f"mean_{mode}"] is None else f"{row[f'mean_{mode}']:.1f} ({values})"


def _table(head, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def draw(results: dict[str, Any], folder: Path) -> None:
    """Writes the figures into a folder.

    Raises:
        UserError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('figures need matplotlib: pip install "sast_jax[plots]"; the same command then goes on') from error
    for name, fill in zip(FIGURES, (_draw_accuracy, _draw_differences), strict=True):
        figure = Figure(figsize=(8.5, 1.3 + 0.36 * len(results["methods"])), layout="constrained")
        fill(figure, results["methods"])
        with atomic_write(folder / name) as file:
            figure.savefig(file, format="png", dpi=150)


_COLORS = {"surrogate": "#8d99ae", "hard": "#d1495b", "gap_size": "#30638e"}


def _rows_of(axes, titles):
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e9ecef")
    axes.set_axisbelow(True)


def _draw_accuracy(figure, methods):
    axes = figure.subplots()
    labels = {"surrogate": "smooth spikes", "hard": "hard spikes, as deployed"}
    for y, row in enumerate(methods.values()):
        for pair in zip(row["surrogate"]["values"], row["hard"]["values"], strict=True):
            axes.plot(pair, [y - 0.16, y + 0.16], color="#d8dbe2", linewidth=0.8, zorder=1)
        for mode, offset in (("surrogate", -0.16), ("hard", 0.16)):
            values = row[mode]["values"]
            axes.scatter(values, [y + offset] * len(values), s=16, color=_COLORS[mode], alpha=0.5, linewidths=0, zorder=2)
            axes.plot(
                [row[mode]["mean"]] * 2,
                [y + offset - 0.13, y + offset + 0.13],
                color=_COLORS[mode],
                linewidth=3,
                zorder=3,
                label=labels[mode] if y == 0 else None,
            )
        cost = f"{row['gradients_ratio']:.3g}x, {row['time_ratio']:.2f}x"
        axes.annotate(cost, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#495057")
    axes.annotate("gradients, time", (1.01, -0.75), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="#495057")
    _rows_of(axes, [row["title"] for row in methods.values()])
    axes.set_xlabel("test accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _draw_differences(figure, methods):
    compared = [row for row in methods.values() if row["comparisons"]]
    titles = [f"{row['title']}\nagainst {methods[row['comparisons'][0]['control']]['title']}" for row in compared]
    headings = {
        "hard": "difference in accuracy with hard spikes, points",
        "gap_size": "difference in the size of the gap, points",
    }
    for axes, (what, heading) in zip(figure.subplots(1, 2, sharey=True), headings.items(), strict=True):
        axes.axvline(0, color="#adb5bd", linewidth=1)
        for y, row in enumerate(compared):
            test = row["comparisons"][0][what]
            reach = 2 * (test["standard_error"] or 0)
            color = _COLORS[what] if test["clear"] else "#adb5bd"
            axes.plot([test["mean"] - reach, test["mean"] + reach], [y, y], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.scatter([test["mean"]], [y], s=36, color=color, zorder=2)
        _rows_of(axes, titles)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel(heading, fontsize=9)


def write_page(results: dict[str, Any], folder: Path) -> None:
    """Writes page and figures into a folder."""
    draw(results, folder)
    with atomic_write(folder / PAGE) as file:
        file.write(render(results).encode(errors="backslashreplace"))
