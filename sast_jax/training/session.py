"""What the training loop knows of its runs: what is common to those of one program, and what is each one's own."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.allocator import expect_array
from sast_jax.data import DESCENT, PERTURBATION, batch_indices, take_batch
from sast_jax.data.checks import content_ids
from sast_jax.devices import is_first_host, memory_bytes, num_cpu_devices, num_sharing
from sast_jax.errors import Diverged, UserError, warn
from sast_jax.evaluation.outputs import BATCH_SIZE
from sast_jax.evaluation.transfer import EvalStep, evaluate_transfer
from sast_jax.files import append_line, atomic_write, parse_json, read_regular, write_json
from sast_jax.randomness import make_key
from sast_jax.training.build import (
    costs_a_gradient,
    load_data,
    make_network,
    make_optimizer,
    make_projection,
    num_gradients,
    sam_schedule,
)
from sast_jax.training.checkpoints import Checkpoints, restore
from sast_jax.training.health import find_symptoms
from sast_jax.training.records import METRICS, METRICS_LINE, RESULTS
from sast_jax.training.run import check_settings, environment, identity, load_warm_start, register
from sast_jax.training.state import TrainState, make_init

Result = dict[str, Any] | Diverged
"""What `results.json` of a run holds, or why it has none."""


class Task:
    """What runs that differ in numbers alone have in common: the data, the network, the schedule."""

    def __init__(self, config: ml_collections.ConfigDict, together: int = 1):
        """Loads the data, and checks what can be checked before training.

        Args:
            config: Config of any of the runs.
            together: Number of runs that are trained at once.
        """
        self.begin = time.monotonic()
        self.config = config
        self.splits = load_data(config)
        self.data = self.splits.describe()
        self.steps_per_epoch = self.data["num_train"] // config.batch_size
        self.num_steps = config.num_epochs * self.steps_per_epoch
        if self.num_steps > config_lib.MAX_INTEGER:
            raise UserError(
                f"num_epochs: {config.num_epochs} of them are {self.num_steps} steps; at most {config_lib.MAX_INTEGER} are "
                "counted"
            )
        self.network = make_network(config, self.splits.num_classes)
        self.project = make_projection(config, self.network)
        tx = make_optimizer(config, self.num_steps, self.project)
        frames = take_batch(self.splits.train, np.arange(1)).frames
        own = config.sam.perturbation_batch_size if costs_a_gradient(config) else 0
        self.perturbation_batch_size = own or config.batch_size
        expect_array(self._largest_array(frames.shape, together))
        self.init = make_init(self.network, tx, frames)
        self.target = jax.eval_shape(self.init, make_key(0), None)
        refuse_too_large(self.target)
        self.warm_start, self.warm_start_cost = load_warm_start(config.warm_start, self.target.params, self.data)
        self.perturbs = sam_schedule(config, self.num_steps)
        self._contents = content_ids(self.splits.train)

    def _largest_array(self, shape, together):
        """Bytes of the largest array of a train step on a device of a CPU.

        At all time steps, or in a chunk of them, a layer's potentials; or the frames, where all steps go through one layer before
        the next.
        """
        config, network = self.config, self.network
        num_steps, _, height, width, num_polarities = shape
        sizes = [network.num_neurons(index, height, width) for index in range(network.num_spiking)]
        is_layer_major = network.order_on_cpu == "layer_major"
        sizes.append(height * width * num_polarities if is_layer_major else 0)
        num_devices = num_cpu_devices()
        batch_sizes = config.batch_size, self.perturbation_batch_size
        num_samples = max(batch_sizes) // config.num_microbatches
        if together > 1:  # If layer by layer, those of a device at once, else one after the other.
            num_samples *= together // num_sharing(together, num_devices) if is_layer_major else 1
        elif cores_share_batches(config):
            num_samples //= num_sharing(math.gcd(*batch_sizes) // config.num_microbatches, num_devices)
        return 4 * min(num_steps, network.time_chunk or num_steps) * num_samples * max(sizes)

    def draw(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """Returns the samples of a step's batches, the second if it has one of its own, and whether their frames are equal."""

        def indices(stream, size):
            return batch_indices(self.data["num_train"], size, seed=seed, stream=stream, step=step)

        descent = indices(DESCENT, self.config.batch_size)
        if self.config.sam.perturbation != "independent" or not self.perturbs(step):
            return descent, None, False
        perturbation = indices(PERTURBATION, self.perturbation_batch_size)
        is_same = np.array_equal(np.sort(self._contents[descent]), np.sort(self._contents[perturbation]))
        return descent, perturbation, is_same


def cores_share_batches(config: ml_collections.ConfigDict) -> bool:
    """Returns whether the cores of a CPU, as devices, share the batches of a single run."""
    # They share the few large products of dense layers well as they are, and each would update their large weights; the other two
    # ask for one device, and what a run computes is not to depend on the number of cores.
    return not (config.network.kind == "mlp" or config.spikes.hard_share or config.sam.ascent == "per_device")


class Session:
    """A run that is being trained, in its folder."""

    def __init__(self, task: Task, config: ml_collections.ConfigDict, workdir: Path, title: str):
        """Begins a run, or takes it up at its last checkpoint, in memory; nothing but `run.json` is written."""
        self.task, self.config, self.workdir, self.title = task, config, workdir, title
        if is_first_host():
            register(workdir, config, task.data)
        check_settings(workdir)
        self._identity = identity(config, task.data)
        restored = restore(workdir, task.target, self._identity)
        if restored is None:
            state = task.init(make_key(config.seed), task.warm_start)
            restored = dataclasses.replace(state, params=task.project(state.params)), 0.0
        self.state: TrainState | None = restored[0]
        self.first_step, self._seconds_before = int(restored[0].step), restored[1]
        if self.first_step > task.num_steps:
            raise UserError(
                f"--workdir: {str(workdir)!r} has a checkpoint of step {self.first_step}, but the run ends at {task.num_steps}"
            )
        self.diverged: Diverged | None = None
        self._shown: set[str] = set()
        self._start_epoch()

    def _start_epoch(self):
        self._metrics = []
        self._num_perturbed = self._num_same = 0  # Steps with a perturbation batch of its own, and of those with equal frames.

    def start(self) -> TrainState:
        """Opens the folder for what comes, and gives the state away."""
        self._checkpoints = Checkpoints(self.workdir, self._identity)
        if is_first_host():
            _forget_metrics_after(self.workdir, self.first_step)
        state, self.state = self.state, None
        return state  # type: ignore[return-value]

    def close(self) -> None:
        """Waits for the last checkpoint to be on disk."""
        self._checkpoints.close()

    def note_batches(self, is_perturbed: bool, is_same: bool) -> None:
        """Counts a step by its batches."""
        self._num_perturbed += is_perturbed
        self._num_same += is_same

    def note_metrics(self, metrics: list[dict[str, float]], first_step: int) -> None:
        """Takes the metrics of successive steps, and finds out whether the last save has failed meanwhile."""
        self._metrics += metrics
        self._check(metrics, first_step)
        self._checkpoints.check()

    def _check(self, metrics, first_step):
        try:
            refuse_non_finite(metrics, first_step, self.workdir)
        except Diverged as error:
            self.diverged = self.diverged or error

    def _evaluate(self, eval_step, params, part, step):
        transfer = evaluate_transfer(eval_step, params, part, BATCH_SIZE)
        self._check([transfer], step)
        return transfer

    def finish_epoch(
        self, epoch: int, step: int, times: dict[str, float], eval_step: EvalStep | None, params: Any
    ) -> dict[str, Any] | None:
        """Writes the line of an epoch, warns of what looks wrong in it, and returns it; nothing of a run that has diverged.

        Args:
            epoch: Number of the epoch, from 1.
            step: Its last step.
            times: What it took.
            eval_step: What evaluates the weights on the validation part, if it is to be done and there is one.
            params: Weights after the epoch.
        """
        validation = {}
        if eval_step is not None and len(self.task.splits.validation.labels):
            validation = self._evaluate(eval_step, params, self.task.splits.validation, step)
        if self.diverged is not None:
            return None
        line: dict[str, Any] = {"step": step, "epoch": epoch, "num_steps": len(self._metrics)}
        line |= {key: float(np.mean([each[key] for each in self._metrics])) for key in self._metrics[0]}
        line |= times | {f"validation_{key}": value for key, value in validation.items()}
        if is_first_host():
            append_line(self.workdir / METRICS, json.dumps(line))
        symptoms = find_symptoms(line)
        if self._num_same > self._num_perturbed / 2:
            symptoms["same batch"] = (
                f"the perturbation batch had the frames of the descent batch in {self._num_same} of {self._num_perturbed} steps, "
                "so this is ordinary SAM. Lower batch_size, or say so: sam.perturbation=same"
            )
        for name in symptoms.keys() - self._shown:
            warn(f"epoch {epoch} of {str(self.workdir)!r}: {symptoms[name]}")
        self._shown |= symptoms.keys()
        self._start_epoch()
        return line

    def save(self, state: TrainState, seconds: float) -> None:
        """Saves the state, with the seconds of training it took, unless the run has diverged."""
        if self.diverged is None:
            self._checkpoints.save(state, seconds=self._seconds_before + seconds)

    def finish(self, eval_step: EvalStep, params: Any, seconds: Callable[[], float], others: dict[str, Any]) -> Result:
        """Evaluates the run and writes `results.json`, unless it has diverged."""
        config, task = self.config, self.task

        def evaluate(part):
            return self._evaluate(eval_step, params, part, task.num_steps)

        if self.diverged is None:
            transfer = evaluate(task.splits.test) if config.test else {}
            validation = evaluate(task.splits.validation) if len(task.splits.validation.labels) else None
        if self.diverged is not None:
            return self.diverged
        epoch_seconds = [line["seconds"] for line in read_metrics(self.workdir) if line["num_steps"] == task.steps_per_epoch]
        results = {
            **transfer,
            **{key: task.data[key] for key in ("num_train", "num_validation")},
            "num_test": task.data["num_test"] if config.test else 0,
            "validation": validation,
            "num_gradient_evaluations": num_gradients(config, task.num_steps),
            "wall_time_seconds": self._seconds_before + seconds(),
            "warm_start_cost": task.warm_start_cost,
            "median_epoch_seconds": float(np.median(epoch_seconds)) if epoch_seconds else None,
            **others,
            "environment": environment(),
            "config": config_lib.to_json(config),
            "data_checksum": task.data["checksum"],
        }
        if is_first_host():
            write_json(self.workdir / RESULTS, results)
        return results


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; a last line without an end, which a crash cut off, is left out.

    Raises:
        UserError: If another line is damaged.
    """
    path = Path(workdir) / METRICS
    texts = _read_bytes(path).split(b"\n")[:-1] if path.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text)
            wrong = METRICS_LINE(line)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise UserError(f"{path}: line {number} is damaged ({wrong}); remove that line")
        lines.append(line)
    return lines


_MAX_METRICS_BYTES = 2**28
"""Lines of half a million epochs; what is larger is not of a run, and reading it could take all memory."""


def _read_bytes(path):
    try:
        return read_regular(path, _MAX_METRICS_BYTES)
    except ValueError as error:
        raise UserError(f"{path}: {error}; it is no file of a run. Move it away, or choose another --workdir") from error


def _forget_metrics_after(workdir, step):
    lines = [line for line in read_metrics(workdir) if line["step"] <= step]
    with atomic_write(workdir / METRICS) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def refuse_non_finite(metrics: Sequence[dict[str, float]], first_step: int, workdir: Path) -> None:
    """Raises a `Diverged` naming quantity and step if a metric of successive steps from `first_step` on is not finite."""
    for step, values in enumerate(metrics, first_step):
        for name, value in values.items():
            if not np.isfinite(value):
                raise Diverged(
                    f"{name} is {value} at step {step}; training stopped. Checkpoints before it are kept in {str(workdir)!r}. "
                    "Lower optimizer.learning_rate or sam.rho, in a new --workdir"
                )


def refuse_too_large(state: TrainState) -> None:
    """Raises a `UserError` if weights and optimizer state alone, given as shapes, exceed the device's memory."""
    needed, memory = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), memory_bytes()
    if memory is not None and needed > memory:
        raise UserError(
            f"network.features: weights and optimizer state need {needed / 2**30:.1f} GiB; this machine has "
            f"{memory / 2**30:.1f}. Take smaller ones"
        )
