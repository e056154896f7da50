r"""Where there is a transfer gap, and where SAST narrows it: one property of the network at a time, slope against radius.

    python benchmarks/axes.py --config=configs/digits.py --workdir=runs/axes_digits --rho=0.2 --config.dataset.downsample=2 \
        --config.optimizer.learning_rate=24e-3 --config.optimizer.warmup=0.15 --processes=2

Every setting is the config with what its row says, trained plainly and by SAST with radius `--rho`; the map takes all
combinations of `--slopes` and `--rhos`. Nothing is selected: all that was trained is shown. Finished runs are not repeated.
Writes `axes_<config>` and `slope_rho_<config>` into `benchmarks/results/`, each as `.json` and `.md`, the second as `.png` too,
and the tables into `docs/results/gap.md`.
"""

import numpy as np
from publish import publish
from transfer_gap import make_parser, numbers, parse, summary, train, train_ahead

SETTINGS = {
    "as configured": {},
    "logistic": {"network.family": "logistic"},
    "fast sigmoid": {"network.family": "fast_sigmoid"},
    "reset by subtraction": {"network.reset": "subtract"},
    "no reset": {"network.reset": "none"},
    "decay 0.5": {"network.decay": 0.5},
    "readout by spike counts": {"network.readout": "rate"},
    "one spiking layer": {"network.features": "8"},
    "three spiking layers": {"network.features": "8,16,16"},
}


def jobs_of(args, fields, rho):
    """Variant, seed and fields of the runs of a setting."""
    variant, own = ("sast", {"sam.rho": rho}) if rho else ("baseline", {})
    return [(variant, seed, fields | own) for seed in args.seeds]


def show(row, key):
    """Mean and standard error."""
    error = row[key]["standard_error"]
    return f"{row[key]['mean']:.1f}" + ("" if error is None else f" ± {error:.1f}")


def settings_table(settings, rho):
    """A row per setting."""
    heads = [
        f"{who}: {what}" for who in ("baseline", f"SAST, rho {rho:g}") for what in ("surrogate, %", "hard, %", "gap, points")
    ]
    lines = [f"| network | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, rows in settings.items():
        cells = [show(rows[who], what) for who in ("baseline", "sast") for what in ("surrogate", "hard", "gap")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def map_table(grid):
    """Hard-spike accuracy and gap, a row per slope, a column per radius."""
    rhos = list(next(iter(grid.values())))
    lines = [f"| slope | {' | '.join(f'rho {rho:g}' if rho else 'no SAM' for rho in rhos)} |", "|---" * (len(rhos) + 1) + "|"]
    for slope, rows in grid.items():
        cells = [f"{show(row, 'hard')} <br><sub>gap {show(row, 'gap')}</sub>" for row in rows.values()]
        lines.append(f"| {slope:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(grid, path):
    """The map as two pictures."""
    from matplotlib.figure import Figure

    slopes, rhos = list(grid), list(next(iter(grid.values())))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (key, title, colors) in zip(
        figure.subplots(1, 2),
        (("hard", "accuracy with hard spikes, %", "viridis"), ("gap", "transfer gap, points", "RdBu_r")),
        strict=True,
    ):
        values = np.array([[row[key]["mean"] for row in rows.values()] for rows in grid.values()])
        reach = np.abs(values).max()
        limits = {"vmin": -reach, "vmax": reach} if key == "gap" else {}
        image = axes.imshow(values, cmap=colors, aspect="auto", origin="lower", **limits)
        for (i, j), value in np.ndenumerate(values):
            lightness = np.mean(image.cmap(image.norm(value))[:3])
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if lightness > 0.5 else "white", fontsize=8)
        axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
        axes.set_yticks(range(len(slopes)), [f"{slope:g}" for slope in slopes])
        axes.set(xlabel="radius of SAST; 0: no SAM", ylabel="slope of the surrogate", title=title)
    figure.savefig(path, dpi=120)


def main():
    """Trains, and writes tables and figure."""
    parser = make_parser(__doc__)
    parser.add_argument("--rho", type=float, required=True)
    parser.add_argument("--slopes", type=numbers, default=(1.0, 2.0, 5.0, 10.0, 25.0))
    parser.add_argument("--rhos", type=numbers, default=(0.0, 0.1, 0.2, 0.4))
    parser.add_argument("--processes", type=int, default=1, help="runs trained side by side, each on its share of the cores")
    args, overrides = parse(parser)

    grid = {slope: {rho: jobs_of(args, {"network.slope": slope}, rho) for rho in args.rhos} for slope in args.slopes}
    settings = {
        title: {who: jobs_of(args, fields, rho) for who, rho in (("baseline", 0.0), ("sast", args.rho))}
        for title, fields in SETTINGS.items()
    }
    both = [*grid.values(), *settings.values()]
    train_ahead(args, overrides, [job for rows in both for jobs in rows.values() for job in jobs])
    for rows in both:
        for key, jobs in rows.items():
            rows[key] = summary([train(args, overrides, variant, seed, **fields) for variant, seed, fields in jobs])
    one = train(args, overrides, "baseline", args.seeds[0])
    changes = [text for text in overrides if not text.startswith("dataset.root")]
    text = (
        f"{', '.join([args.config, *changes])}. Test accuracy, mean ± standard error over seeds "
        f"{', '.join(map(str, args.seeds))}; {one['num_train']} training, "
        f"{one['num_validation']} validation and {one['num_test']} test recordings, {one['config']['num_epochs']} epochs."
    )
    name = args.config.rpartition("/")[2].removesuffix(".py")
    results = {
        "overrides": changes,
        "seeds": args.seeds,
        "rho": args.rho,
        "environment": one["environment"],
        "settings": settings,
        "map": {f"{slope:g}": {f"{rho:g}": row for rho, row in rows.items()} for slope, rows in grid.items()},
    }
    publish(f"axes_{name}", results, f"{settings_table(settings, args.rho)}\n\n{text}\n", args.output)
    publish(f"slope_rho_{name}", results["map"], f"{map_table(grid)}\n\n{text}\n", args.output)
    draw(grid, args.output / f"slope_rho_{name}.png")


if __name__ == "__main__":
    main()
