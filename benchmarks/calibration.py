r"""How close simulated N-MNIST recordings are to real ones: what they count, recording by recording, over the same images.

    python benchmarks/calibration.py --images=FOLDER --root=FOLDER
    python benchmarks/calibration.py --images=FOLDER --root=FOLDER --fit=600

Recording k of N-MNIST shows MNIST's training image k - 1, so each real recording is compared with a simulated one of its own
image, by the recorder of `digits` and by the one fitted to N-MNIST. Only counts are compared; labels check the pairing, and no
network is involved. `--fit` looks for a better recorder by random changes for so many seconds, on every sixth recording, and
prints it; the mismatch of pixels is not fitted but set to match the scatter in the table. Writes
`benchmarks/results/calibration.json`, `.md` and `.png`, and the table into its page.
"""

import time
from pathlib import Path

import numpy as np
from publish import Parser, publish

from sast_jax.data import simulated
from sast_jax.data.events import bin_events
from sast_jax.data.images import load_mnist
from sast_jax.data.recorded import find_recordings, read_events

NUM_TIME_STEPS = 10
PROFILE_STEP = 10_000


def measure(recordings):
    """What a set of recordings counts."""
    duration, size = simulated.NMNIST.duration, simulated.SENSOR_SIZE
    recordings = [events[events["t"] < duration] for events in recordings]
    binning = {"sensor_size": size, "duration": duration}
    frames = np.stack([bin_events(events, num_time_steps=NUM_TIME_STEPS, **binning) for events in recordings])
    intervals = []
    for events in recordings:
        pixel = events["y"].astype(int) * size[1] + events["x"]
        order = np.lexsort((events["t"], pixel))
        intervals.append(np.diff(events["t"][order])[np.diff(pixel[order]) == 0])
    times = np.concatenate([events["t"] for events in recordings])
    return {
        "num_events": np.array([len(events) for events in recordings]),
        "on_share": np.array([events["p"].mean() for events in recordings]),
        "profile": np.bincount(times // PROFILE_STEP, minlength=duration // PROFILE_STEP) / len(recordings),
        "by_pixel": frames.sum((1, 4), dtype=int),  # [N, H, W]
        "is_on": frames > 0,  # [N, T, H, W, 2]
        "interval_ms": np.percentile(np.concatenate(intervals), [10, 50, 90]) / 1e3,
    }


def correlation(a, b):
    """Mean correlation of corresponding recordings."""
    return float(np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]))


def distance(a, b):
    """Sum of absolute differences relative to the sum of the second."""
    return float(np.abs(a - b).sum() / np.abs(b).sum())


def histogram(by_pixel):
    """Shares of pixels with 0, 1, ... events."""
    return np.bincount(np.minimum(by_pixel, 30).ravel(), minlength=31) / by_pixel.size


def compare(own, real):
    """How far a simulation is from the real recordings, by name."""
    return {
        "profile": distance(own["profile"], real["profile"]),
        "map": distance(own["by_pixel"].mean(0), real["by_pixel"].mean(0)),
        "histogram": distance(histogram(own["by_pixel"]), histogram(real["by_pixel"])),
        "occupancy": distance(own["is_on"].mean((0, 2, 3)), real["is_on"].mean((0, 2, 3))),
        "num_events_correlation": float(np.corrcoef(own["num_events"], real["num_events"])[0, 1]),
        "pixel_correlation": correlation(own["by_pixel"], real["by_pixel"]),
        "frame_correlation": correlation(own["is_on"], real["is_on"]),
    }


def scatter(by_pixel):
    """Robust relative deviation of a pixel's mean from the median of its 5 x 5 neighbours, where there are events."""
    from scipy.ndimage import median_filter

    mean = by_pixel.mean(0)
    low, high = np.percentile((mean / np.maximum(median_filter(mean, 5), 1e-9))[mean > 3], [16, 84])
    return (high - low) / 2


def misfit(own, real):
    """One number to make small: all of `compare`, and mean, spread and intervals relative to the real ones."""
    rows = compare(own, real)
    relative = [abs(f(own["num_events"]) / f(real["num_events"]) - 1) for f in (np.mean, np.std)]
    intervals = np.abs(np.log(own["interval_ms"] / real["interval_ms"])).mean()
    return sum(1 - value if name.endswith("correlation") else value for name, value in rows.items()) + sum(relative) + intervals


def changed(recorder, rng):
    """A recorder with some of its numbers changed at random."""

    def near(value, deviation, low=0.0):
        return max(low, value + deviation * rng.normal()) if rng.random() < 0.2 else value

    camera = recorder.camera
    return recorder._replace(
        camera=camera._replace(
            contrast_threshold=near(camera.contrast_threshold, 0.03, 0.05),
            noise_rate=near(camera.noise_rate, 0.1),
        ),
        dark_current=near(recorder.dark_current, 0.03, 0.01),
        corners=tuple(tuple(near(shift, 0.2, -np.inf) for shift in corner) for corner in recorder.corners),
        starts=tuple(round(near(start, 2_000)) for start in recorder.starts),
        lengths=tuple(round(near(length, 5_000)) for length in recorder.lengths),
        amplitude_deviation=near(recorder.amplitude_deviation, 0.02),
        corner_deviation=near(recorder.corner_deviation, 0.1),
        object_size=near(recorder.object_size, 0.5, 20),
        time_constant=near(recorder.time_constant, 1_000),
    )


def fit(images, events, seconds):
    """Looks for a recorder of smaller misfit and prints each."""
    images, real = images[::6], measure(events[::6])
    rng, best, start = np.random.default_rng(0), None, time.monotonic()
    recorder = simulated.NMNIST
    while time.monotonic() - start < seconds:
        value = misfit(measure(simulated.simulate_saccades(images, seed=0, recorder=recorder)), real)
        if best is None or value < best[0]:
            best = value, recorder
            print(f"{value:.4f} {recorder}", flush=True)
        recorder = changed(best[1], rng)


def rows(measured):
    """The table's rows: what, and a function of a set's measures (and the real ones) to text."""
    real = measured["real"]
    either = {
        "events per recording, mean ± standard deviation": lambda m: (
            f"{m['num_events'].mean():.0f} ± {m['num_events'].std():.0f}"
        ),
        "share of ON events, %": lambda m: f"{100 * m['on_share'].mean():.1f} ± {100 * m['on_share'].std():.1f}",
        "events in each third of the recording, %": lambda m: " / ".join(
            f"{100 * part.sum() / m['profile'].sum():.0f}" for part in np.array_split(m["profile"], 3)
        ),
        "pixels without an event, %": lambda m: f"{100 * (m['by_pixel'] == 0).mean():.1f}",
        "events per pixel that has some": lambda m: f"{m['by_pixel'][m['by_pixel'] > 0].mean():.2f}",
        "scatter between neighbouring pixels, %": lambda m: f"{100 * scatter(m['by_pixel']):.1f}",
        "ones in binary frames, %": lambda m: f"{100 * m['is_on'].mean():.2f}",
        "interval of a pixel's events, ms (10 %, 50 %, 90 %)": lambda m: ", ".join(f"{each:.1f}" for each in m["interval_ms"]),
    }
    against = {
        "time profile in steps of 10 ms": ("profile", "{:.2f}"),
        "mean events by pixel": ("map", "{:.2f}"),
        "shares of pixels with 0, 1, 2 ... events": ("histogram", "{:.2f}"),
        "ones by frame and polarity": ("occupancy", "{:.2f}"),
        "number of events": ("num_events_correlation", "{:.3f}"),
        "events by pixel": ("pixel_correlation", "{:.3f}"),
        "binary frames": ("frame_correlation", "{:.3f}"),
    }
    lines = [[name, *(show(each) for each in measured.values())] for name, show in either.items()]
    for name, (key, form) in against.items():
        kind = "correlation with the real recording" if key.endswith("correlation") else "relative difference"
        cells = [form.format(compare(each, real)[key]) for which, each in measured.items() if which != "real"]
        lines.append([f"{name}: {kind}", "", *cells])
    return lines


def draw(measured, path):
    """Time profiles and mean events by pixel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.6), layout="constrained", width_ratios=(2, 1, 1))
    colors = {"real": "#22223b", "digits": "#c8ccd4", "nmnist": "#d1495b"}
    titles = {"real": "real", "digits": "recorder of digits", "nmnist": "fitted recorder"}
    for name, each in measured.items():
        middle = (np.arange(len(each["profile"])) + 0.5) * PROFILE_STEP / 1e3
        axes[0].plot(middle, each["profile"], color=colors[name], label=titles[name], linewidth=2 if name == "real" else 1.4)
    axes[0].set_xlabel("time, ms")
    axes[0].set_ylabel("events per 10 ms")
    axes[0].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=3)
    axes[0].spines[["top", "right"]].set_visible(False)
    top = max(measured[name]["by_pixel"].mean(0).max() for name in ("real", "nmnist"))
    for axis, name in zip(axes[1:], ("real", "nmnist"), strict=True):
        axis.imshow(measured[name]["by_pixel"].mean(0), cmap="magma", vmin=0, vmax=top)
        axis.set_title(f"{titles[name]}: mean by pixel", fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=160)


def main():
    """Compares, and writes the table and the figure."""
    parser = Parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--root", default="", help="folder of N-MNIST recordings; $SAST_JAX_DATA/NMNIST if not given")
    parser.add_argument("--fit", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()

    folder = find_recordings("nmnist", args.root, download=False)
    ids = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.glob("T*/*/*.bin"))
    events = list(read_events("nmnist", folder, ids))
    mnist = load_mnist(args.images, "train")
    shown = np.array([int(name.rpartition("/")[2]) for name in ids]) - 1
    labels = np.array([int(name.split("/")[1]) for name in ids])
    if (mnist.labels[shown] != labels).any():
        raise SystemExit("recordings and images do not belong together: their labels differ")
    images = mnist.pixels[shown] / np.float32(255)
    if args.fit:
        fit(images, events, args.fit)
        return
    measured = {"real": measure(events)}
    for name, recorder in (("digits", simulated.DIGITS), ("nmnist", simulated.NMNIST)):
        measured[name] = measure(simulated.simulate_saccades(images, seed=0, recorder=recorder))
    lines = ["| | real | recorder of digits | fitted recorder |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(measured)]
    text = (
        f"{len(ids)} real recordings of N-MNIST and simulated ones of the same images. Relative difference: sum of absolute "
        "differences over the sum of the real."
    )
    results = {
        "num_recordings": len(ids),
        "compare": {name: compare(measured[name], measured["real"]) for name in ("digits", "nmnist")},
        "table": rows(measured),
        "recorder": simulated.NMNIST._asdict() | {"camera": simulated.NMNIST.camera._asdict()},
    }
    publish("calibration", results, "\n".join(lines) + f"\n\n{text}\n", args.output)
    draw(measured, args.output / "calibration.png")


if __name__ == "__main__":
    main()
