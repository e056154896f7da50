"""What a report shows: the files of each run, and what the networks do with one recording."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sast_jax.data import take_batch
from sast_jax.errors import UserError
from sast_jax.evaluation.outputs import predict_logits, trace
from sast_jax.evaluation.robustness import MODES
from sast_jax.training.records import EVALUATION, RESULTS, RUN, THEORY, read_record
from sast_jax.training.run import load_run, load_run_and_data, read_config, read_run, run_members
from sast_jax.training.session import read_metrics

_NUM_SEARCHED = 200  # Test recordings among which one is sought that the modes decide differently.
_NUM_NEURONS = 32  # In a raster.


class RunFiles(NamedTuple):
    """What the folder of a run holds; a file that is not there is empty or `None`.

    Attributes:
        config: The config it was trained with.
        data: Sizes of the parts of its data set.
        environment: Versions and device.
        results: Of training.
        metrics: Of each epoch.
        evaluation: Of `sast-jax evaluate`, by suite.
        theory: Of `sast-jax theory`.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    theory: dict[str, Any] | None


class Layer(NamedTuple):
    """A layer of spiking neurons while it sees the recording.

    Attributes:
        name: Its name in the tree of weights.
        num_neurons: How many it has.
        num_active: How many of them spike in hard mode.
        spikes: By mode `[T, N]`, of some neurons, from the most active in hard mode to the least.
        potentials: By mode `[T, 2]`, of two of them.
    """

    name: str
    num_neurons: int
    num_active: int
    spikes: dict[str, np.ndarray]
    potentials: dict[str, np.ndarray]


class Example(NamedTuple):
    """A test recording and what the networks make of it.

    Attributes:
        id: Its name in the data set.
        label: Its class.
        is_disputed: Whether the first network decides it differently in the two modes.
        frames: `[T, H, W, 2]`.
        logits: By run and mode, `[K]`.
        layers: By run.
    """

    id: str
    label: int
    is_disputed: bool
    frames: np.ndarray
    logits: dict[str, dict[str, np.ndarray]]
    layers: dict[str, list[Layer]]


class Report(NamedTuple):
    """All that a report shows.

    Attributes:
        workdir: Where it is from.
        runs: The runs by name.
        example: A recording; or, where there is none, why.
    """

    workdir: Path
    runs: dict[str, RunFiles]
    example: Example | str


def gather(workdir: Path, overrides: Sequence[str] = ()) -> Report:
    """Reads a run, or the runs of a folder, those not begun left out, and shows them a recording.

    Args:
        workdir: Folder of a run or of several.
        overrides: `dataset.root=FOLDER` if the recordings have moved.

    Raises:
        UserError: If there is no run, or one of its files is damaged.
    """
    folders = {name or workdir.resolve().name: workdir / name for name in run_members(workdir) or [""]}
    folders = {name: folder for name, folder in folders.items() if read_run(folder) is not None}
    if not folders:
        raise UserError(f"--workdir: {str(workdir)!r} is no run; expected a folder that `sast-jax train` wrote, with {RUN}")
    runs = {name: _read(folder) for name, folder in folders.items()}
    try:
        example: Example | str = _show(folders, overrides, runs)
    except UserError as error:  # No checkpoint yet, or the recordings are gone; the rest can be told without.
        example = str(error)
    return Report(workdir, runs, example)


def _read(folder):
    run = read_run(folder)
    read_config(folder, run)  # Refuses what is no config.
    evaluation, theory = (read_record(folder / name) for name in (EVALUATION, THEORY))
    results, metrics = read_record(folder / RESULTS), read_metrics(folder)
    if results is not None and metrics:  # Of a finished run only what was measured at its last weights.
        evaluation, theory = (each if each and each.get("step") == metrics[-1]["step"] else None for each in (evaluation, theory))
    return RunFiles(run["config"], run["data"], run["environment"], results, metrics, evaluation or {}, theory)


def _show(folders, overrides, runs):
    trained = {name: load_run(folder) for name, folder in folders.items()}
    if len({run.data["checksum"] for run in runs.values()}) > 1:
        raise UserError("the runs were trained on different recordings")
    first = next(iter(trained))
    _, _, splits = load_run_and_data(folders[first], overrides)
    test = splits.test.take(np.arange(min(_NUM_SEARCHED, len(splits.test.labels))))
    by_mode = [predict_logits(trained[first].network, trained[first].params, test, mode) for mode in MODES]
    disputed = np.flatnonzero(by_mode[0].argmax(-1) != by_mode[1].argmax(-1))
    one = test.take(disputed[:1] if len(disputed) else np.arange(1))
    frames = take_batch(one, np.arange(1)).frames
    states = {name: {mode: trace(run.network, run.params, frames, mode) for mode in MODES} for name, run in trained.items()}
    return Example(
        id=str(one.ids[0]),
        label=int(one.labels[0]),
        is_disputed=bool(len(disputed)),
        frames=frames[:, 0],
        logits={
            name: {mode: predict_logits(run.network, run.params, one, mode)[0] for mode in MODES} for name, run in trained.items()
        },
        layers={
            name: [_layer(run.network, states[name], index) for index in range(run.network.num_spiking)]
            for name, run in trained.items()
        },
    )


def _layer(network, states, index):
    potentials, spikes = (
        {mode: np.asarray(state[index][field])[:, 0].reshape(len(state[index][field]), -1) for mode, state in states.items()}
        for field in (0, 1)
    )
    counts, highest = spikes["hard"].sum(axis=0), potentials["hard"].max(axis=0)
    order = np.lexsort((-highest, -counts))  # The most active first; the silent ones by how close they come.
    num_active = int(np.sum(counts > 0))
    ranks = np.unique(np.linspace(0, max(num_active - 1, 0), _NUM_NEURONS).astype(int))
    traced = [order[max(num_active - 1, 0) * share // 3] for share in (1, 2)]
    return Layer(
        name=network.layer_names[index],
        num_neurons=len(counts),
        num_active=num_active,
        spikes={mode: each[:, order[ranks]] for mode, each in spikes.items()},
        potentials={mode: each[:, traced] for mode, each in potentials.items()},
    )
