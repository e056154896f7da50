"""Speed of loading, and the share of a train step that waits for data, against other ways of loading, all in one run.

    python benchmarks/pipeline.py

Needs the recordings in `$SAST_JAX_DATA` and `pip install grain`. Each way ends with a time-major batch of 0 and 1 on the device.
tonic's go through the recordings one by one in a plain loop, as PyTorch's DataLoader does without workers (PyTorch itself is not
used); grain reads ahead in one thread, as sast_jax does. The ways take turns, so that a busy machine slows all of them alike.
Writes `benchmarks/results/pipeline.json` and `.md`, and the table into `docs/results/speed.md`.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

import grain
import jax
import numpy as np
import tonic
from publish import Parser, processor, publish

from sast_jax.config import load_configs
from sast_jax.data import DESCENT, Prefetch, batch_indices, make_take, sensor_size, take_batch
from sast_jax.data.batches import Batch
from sast_jax.data.recorded import find_recordings
from sast_jax.training import init_state, make_train_step
from sast_jax.training.build import load_data, make_augment, make_network, make_optimizer

WORKLOADS = {
    "N-MNIST": ("configs/nmnist.py:baseline", []),
    "DVS128 Gesture": (
        "configs/dvs_gesture.py:small_baseline",
        ["dataset.num_test=2", "dataset.num_validation=0", "batch_size=8"],  # Ten recordings are at hand.
    ),
}
SMALL = ("network.features=2", "dataset.num_time_steps=3", "dataset.num_validation=0", "batch_size=4")
ENDLESS = 10**9


class TonicRecordings:
    """Recordings that tonic decodes and turns into frames at each access."""

    def __init__(self, config, recordings, duration):
        """Finds the files of the recordings."""
        folder = find_recordings(config.dataset.name, "", download=False)
        self.is_nmnist = config.dataset.name == "nmnist"
        suffix = "bin" if self.is_nmnist else "npy"
        self.files = [folder / f"{name}.{suffix}" for name in recordings.ids]
        self.labels = recordings.labels
        self.factor = config.dataset.downsample
        self.duration = duration
        _, num_time_steps, height, width, _ = recordings.frames.shape
        self.to_frame = tonic.transforms.ToFrame(sensor_size=(width, height, 2), n_time_bins=num_time_steps)

    def __len__(self):
        """Number of recordings."""
        return len(self.files)

    def __getitem__(self, index):
        """Frames `[T, 2, H, W]` and label."""
        if self.is_nmnist:
            events = tonic.io.read_mnist_file(str(self.files[index]), dtype=tonic.datasets.NMNIST.dtype)
        else:
            columns = np.load(self.files[index])
            columns[:, 3] *= 1000
            events = np.lib.recfunctions.unstructured_to_structured(columns, tonic.datasets.DVSGesture.dtype)
        events = events[events["t"] < self.duration]
        events["x"] //= self.factor
        events["y"] //= self.factor
        return self.to_frame(events), self.labels[index]


def to_batch(frames, labels, axes):
    """A batch on the device from stacked frames whose axes are reordered."""
    frames = np.ascontiguousarray(np.minimum(frames, 1).astype(np.uint8).transpose(axes))
    return jax.device_put(Batch(frames, np.asarray(labels, np.int32), np.ones(len(labels), bool)))


def one_by_one(dataset, batch_size):
    """Batches of a dataset that is indexed sample by sample."""
    for epoch in itertools.count():
        order = np.random.default_rng(epoch).permutation(len(dataset))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            frames, labels = zip(*(dataset[i] for i in order[start : start + batch_size]), strict=True)
            yield to_batch(np.stack(frames), labels, (1, 0, 3, 4, 2))


class InMemory:
    """Binned recordings as grain indexes them."""

    def __init__(self, recordings):
        """Keeps them."""
        self.recordings = recordings

    def __len__(self):
        """Number of recordings."""
        return len(self.recordings.labels)

    def __getitem__(self, index):
        """Frames `[T, H, W, 2]` and label."""
        return self.recordings.frames[index], self.recordings.labels[index]


def grain_batches(recordings, batch_size):
    """Batches by grain, over the frames in memory, as many ahead as ours."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(InMemory(recordings)).seed(0).shuffle().repeat().batch(batch_size)
    for frames, labels in dataset.to_iter_dataset(options):
        yield to_batch(frames, labels, (1, 0, 2, 3, 4))


def ours(recordings, batch_size, limit):
    """Batches as training draws them."""
    take = make_take(recordings, max_resident_bytes=limit)

    def draw(step):
        return take(batch_indices(len(recordings.labels), batch_size, seed=0, stream=DESCENT, step=step))

    with Prefetch(draw, num_steps=ENDLESS) as batches:
        yield from map(batches, itertools.count())


def ways(config, splits, folder):
    """The ways of loading by name; the first one is what the others are compared with."""
    recordings = splits.train
    files = TonicRecordings(config, recordings, splits.duration)
    cached = tonic.DiskCachedDataset(files, cache_path=folder)
    for index in range(len(cached)):  # The first pass, which fills it, is not measured.
        cached[index]
    return {
        "sast_jax, frames on the device": ours(recordings, config.batch_size, None),
        "sast_jax, frames on the host": ours(recordings, config.batch_size, 0),
        "grain, frames in memory": grain_batches(recordings, config.batch_size),
        "tonic, DiskCachedDataset": one_by_one(cached, config.batch_size),
        "tonic, decoded at each access": one_by_one(files, config.batch_size),
    }


def measure(config, rounds, num_batches, num_steps):
    """Returns a row per way."""
    splits = load_data(config)
    network, tx = make_network(config, splits.num_classes), make_optimizer(config, 1000)
    state = init_state(network, tx, take_batch(splits.train, np.arange(1)).frames, seed=0)
    step = make_train_step(network, tx, config.mode, augment=make_augment(config))
    with tempfile.TemporaryDirectory() as folder:
        loaders = ways(config, splits, folder)
        for batches in loaders.values():
            state, _ = step(state, next(batches))
        seconds = {name: [] for name in loaders}
        waiting = {name: [] for name in loaders}
        for _, (name, batches) in itertools.product(range(rounds), loaders.items()):
            start = time.perf_counter()
            for _ in range(num_batches):
                jax.block_until_ready(next(batches))
            seconds[name].append((time.perf_counter() - start) / num_batches)
            waited, start = 0.0, time.perf_counter()
            for _ in range(num_steps):
                asked = time.perf_counter()
                batch = jax.block_until_ready(next(batches))
                waited += time.perf_counter() - asked
                state, _ = step(state, batch)
                jax.block_until_ready(state)
            waiting[name].append(waited / (time.perf_counter() - start))
        for batches in loaders.values():
            batches.close()
    reference = np.array(next(iter(seconds.values())))
    return {
        name: {
            "batches_per_second": round(float(1 / np.median(values)), 1),
            "ratio": round(float(np.median(np.array(values) / reference)), 2),
            "waiting_percent": [round(100 * float(q), 2) for q in np.quantile(waiting[name], (0.25, 0.5, 0.75))],
        }
        for name, values in seconds.items()
    }


def markdown(tables, environment):
    """One table per workload."""
    lines = []
    for workload, table in tables.items():
        lines += [f"| {workload} | batches a second | time of a batch | share of a train step that waits, % (quartiles) |"]
        lines += ["|---|---|---|---|"]
        for name, row in table.items():
            low, median, high = row["waiting_percent"]
            lines.append(
                f"| {name} | {row['batches_per_second']:,.0f} | {row['ratio']:.2f}x | {median:.2f} ({low:.2f} - {high:.2f}) |"
            )
        lines.append("")
    lines.append(
        "jax {jax}, grain {grain}, tonic {tonic} on {cores} {device} cores, {rounds} rounds, load {load_average:.1f} at the "
        "start.".format(**environment)
    )
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=20, help="in a round, without train steps")
    parser.add_argument("--steps", type=int, default=4, help="in a round, each with its batch")
    args = parser.parse_args()
    if not Path(os.environ.get("SAST_JAX_DATA", "")).is_dir():
        parser.error("the environment variable SAST_JAX_DATA must name the folder of NMNIST/ and DVSGesture/")
    rounds, small = (2, SMALL) if args.small else (args.rounds, ())
    environment = {
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "grain": grain.__version__,
        "tonic": tonic.__version__,
        "rounds": rounds,
    }
    tables = {}
    for title, (spec, overrides) in WORKLOADS.items():
        config = load_configs(spec, [*overrides, *small])[""]
        height, width = sensor_size(config.dataset.name, config.dataset.downsample)
        workload = f"{title}, {height}x{width}, T {config.dataset.num_time_steps}, batch {config.batch_size}"
        tables[workload] = measure(config, rounds, args.batches, args.steps)
    publish("pipeline", {"environment": environment, "workloads": tables}, markdown(tables, environment), args.output)


if __name__ == "__main__":
    main()
