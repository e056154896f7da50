"""Training on several devices and by several processes equals training on one."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sast_jax import SpikingConvNet, SpikingMLP, load_run
from sast_jax.cli import main
from sast_jax.devices import connect_hosts, is_split, make_mesh
from sast_jax.errors import UserError
from sast_jax.evaluation.outputs import sharing_devices
from sast_jax.evaluation.suites import evaluate_run
from sast_jax.training import read_metrics, train_and_evaluate
from sast_jax.training.loop import _mesh_of_samples
from tests.conftest import TINY

TRAIN = """
import jax, jax.numpy as jnp, numpy as np, optax
from sast_jax import SpikingConvNet, SpikingMLP, sam
from sast_jax.config import load_configs
from sast_jax.data import BATCH_SPECS, Recordings, make_augment, make_take
from sast_jax.data.loading import RESIDENT_BYTES, _resident_bytes
from sast_jax.devices import WHOLE, make_mesh, place, share_threads, to_pool
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step
from sast_jax.training import init_state, make_train_step
from sast_jax.training.build import build_train_step, make_optimizer
from tests.test_training import draw

mesh = make_mesh(8)
batches = draw(0, 8), draw(1, 8)


def train(network, tx, mesh, ascent="global", num_steps=3, augment=None, num_microbatches=1):
    state = place(init_state(network, tx, batches[0].frames[:, :1], seed=0), mesh, WHOLE)
    step = make_train_step(
        network, tx, "surrogate", augment=augment, num_microbatches=num_microbatches, mesh=mesh, ascent=ascent
    )
    for _ in range(num_steps):
        state, metrics = step(state, *(place(batch, mesh, BATCH_SPECS) for batch in batches))
    return state, metrics


def assert_close(a, b, tolerance=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance, rtol=1e-5), a, b)
"""

STEPS = """
assert mesh.size == 4
assert make_mesh(6).size == 3 and make_mesh(5) is None
assert share_threads(mesh) and not share_threads(None)

# Augmentation draws what it would on one device, and gradients are accumulated within each device's part.
augment = make_augment(max_shift=1, drop=0.2, binary=True, seed=0)
network, tx = SpikingMLP(3, features=(6,)), optax.chain(sam(0.3, active=lambda count: count % 2 == 0), optax.adam(0.01))
one = train(network, tx, None, augment=augment)
four = train(network, tx, mesh, augment=augment, num_microbatches=2)
assert_close(one, four)
assert len(four[0].params["readout"]["kernel"].sharding.device_set) == 4

# m-sharpness: each part of two samples climbs its own gradient; the mean of the gradients there is descended.
tx = optax.chain(sam(0.3), optax.sgd(0.5))
apart, _ = train(network, tx, mesh, "per_device", num_steps=1)
params = init_state(network, tx, batches[0].frames[:, :1], seed=0).params


@jax.jit
@jax.grad
def gradient(params, batch):
    logits = network.apply({"params": params}, batch.frames.astype(jnp.float32)).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def descent(indices):
    part, other = (batch._replace(frames=batch.frames[:, indices], labels=batch.labels[indices]) for batch in batches)
    climb = gradient(params, other)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(climb)))
    return gradient(jax.tree.map(lambda w, g: w + 0.3 * g / norm, params, climb), part)


descents = [descent(slice(2 * i, 2 * i + 2)) for i in range(4)]
expected = jax.tree.map(lambda w, *each: w - 0.5 * sum(each) / 4, params, *descents)
assert_close(apart.params, expected, 2e-5)
together = jax.tree.map(lambda w, each: w - 0.5 * each, params, descent(slice(8)))
assert np.abs(apart.params["readout"]["kernel"] - together["readout"]["kernel"]).max() > 1e-5

# Without SAM there is nothing to climb: all devices take one step.
config = load_configs("configs/digits.py:baseline", ["network.kind=mlp", "network.features=6"])[""]
with config.unlocked():
    config.sam.ascent = "per_device"
tx = make_optimizer(config, 1)
plain = []
for m in (None, mesh):
    state = place(init_state(network, tx, batches[0].frames[:, :1], seed=0), m, WHOLE)
    state, _ = build_train_step(config, network, 1, m)(state, *(place(batch, m, BATCH_SPECS) for batch in batches))
    plain.append(state.params)
assert_close(*plain, 2e-5)
assert len({np.asarray(part.data).tobytes() for part in plain[1]["readout"]["kernel"].addressable_shards}) == 1

# Evaluation pads a batch that the devices do not divide, and batches from the host equal those gathered on devices.
rng = np.random.default_rng(0)
frames = (rng.random((7, 4, 5, 5, 2)) < 0.4).astype(np.uint8)
recordings = Recordings(frames, rng.integers(0, 3, 7).astype(np.int32), np.arange(7).astype(str))
one, four = (evaluate_transfer(make_eval_step(network, m), p, recordings, 5) for m, p in ((None, params), (mesh, apart.params)))
alone = evaluate_transfer(make_eval_step(network), jax.device_get(apart.params), recordings, 5)
for key in alone:
    np.testing.assert_allclose(four[key], alone[key], rtol=1e-5)
assert four["surrogate_loss"] != one["surrogate_loss"]
indices = np.array([6, 0, 2, 2])
for limit in (0, 10**9):
    taken = make_take(recordings, mesh=mesh, max_resident_bytes=limit)(indices)
    assert {len(leaf.sharding.device_set) for leaf in taken} == {4}
    assert_close(taken, make_take(recordings)(indices), 0)
assert _resident_bytes(mesh) == RESIDENT_BYTES // 4 == _resident_bytes(None) // 4

# Going on in the pool of threads changes no bit, and no gradient.
x = jnp.array([-0.0, 1e-30, 1.5])
for pooled in (to_pool(x), jax.jit(to_pool)(x)):
    assert np.asarray(pooled).tobytes() == np.asarray(x).tobytes()
assert jax.grad(lambda x: to_pool(x).sum())(x).tolist() == [1, 1, 1]
print("done")
"""

MEETINGS = """
network, tx = SpikingConvNet(3, features=(2,), kernel_size=3), optax.chain(sam(0.3), optax.sgd(0.5))
one = train(network, tx, None, num_steps=1)
assert_close(one, train(network, tx, mesh, num_steps=1))


def count_meetings(ascent):
    state = init_state(network, tx, batches[0].frames[:, :1], seed=0)
    step = make_train_step(network, tx, "surrogate", mesh=mesh, ascent=ascent)
    return step.lower(state, *batches).compile().as_text().count(" all-reduce(")


print(count_meetings("global"), count_meetings("per_device"))
"""


def python(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.usefixtures("four_devices")
def test_step_evaluation_and_batches_on_four_devices_equal_those_on_one():
    assert python(TRAIN + STEPS) == "done\n"


@pytest.mark.perf
@pytest.mark.usefixtures("four_devices")
def test_devices_meet_for_each_gradient_and_for_the_metrics():
    assert python(TRAIN + MEETINGS) == "3 2\n"  # However many arrays these have.


POOL = """
import jax, jax.numpy as jnp
from sast_jax import SpikingConvNet
from sast_jax.devices import to_pool

copies = [jax.jit(to_pool).lower(jnp.ones(3)).compile().as_text().count("u8[1049600]{0} copy(")]
for size in (8, 32):  # 32 * 32 * 4 * 32 neurons.
    frames, network = jnp.ones((2, 32, size, size, 2)), SpikingConvNet(3, features=(4,))
    params = network.init(jax.random.key(0), frames)
    apply = jax.jit(lambda params, frames: network.apply(params, frames, "hard").logits)
    copies.append(apply.lower(params, frames).compile().as_text().count("u8[1049600]{0} copy("))
print(len(jax.devices()), copies)
"""


@pytest.mark.perf
@pytest.mark.usefixtures("four_devices")
def test_large_networks_go_on_in_the_pool_where_a_cpu_is_several_devices(monkeypatch):
    assert python(POOL) == "4 [1, 0, 1]\n"
    monkeypatch.delenv("XLA_FLAGS")
    assert python(POOL) == "1 [0, 0, 0]\n"


def numbers(tree):
    """The numbers of a tree; but for times and the best temperature, which rounding decides where all decisions are right."""
    leaves = [(str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if isinstance(leaf, int | float)]
    return {path: leaf for path, leaf in leaves if not any(key in path for key in ("seconds", "temperature", "scaled_loss"))}


RUNS = """
import sys, warnings
from pathlib import Path
from sast_jax.config import load_configs
from sast_jax.training import train_and_evaluate, train_many

folder, *overrides = sys.argv[1:]
config = load_configs("configs/nmnist.py:sast", overrides)[""]
print(train_and_evaluate(config, Path(folder) / "one")["num_devices"])
configs = [load_configs("configs/nmnist.py:sast", [*overrides, f"seed={seed}"])[""] for seed in (0, 1, 2, 3)]
workdirs = [Path(folder) / str(seed) for seed in range(4)]
results = train_many(configs, workdirs, titles=["run"] * 4, together=4)
print({(result["num_devices"], result["num_runs_together"]) for result in results})
"""


def assert_runs_equal(a, b):
    run, other = load_run(a), load_run(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), run.params, other.params)
    for x, y in zip(read_metrics(a), read_metrics(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    x, y = run.results, other.results
    for key in ("surrogate_loss", "hard_accuracy", "num_test", "num_gradient_evaluations"):
        assert x[key] == pytest.approx(y[key], rel=1e-4), key


SPLIT = """
import os
from sast_jax.devices import split_cpu
import jax

for num_cores, is_late, flags in CASES:
    if os.fork() == 0:  # A CPU is split once a process; until here this one has used no device.
        os.environ["XLA_FLAGS"] = flags
        os.sched_getaffinity = lambda process: set(range(num_cores))
        is_late and jax.devices()
        print(split_cpu(), len(jax.devices()), flush=True)
        os._exit(0)
    os.wait()
"""


def test_each_core_becomes_a_device_unless_their_number_is_set_or_late(monkeypatch):
    cases = [(3, False, ""), (40, False, ""), (1, False, ""), (3, True, "")]
    cases.append((3, False, "--xla_force_host_platform_device_count=2"))
    answers = ["True 3", "True 8", "False 1", "False 1", "False 2"]
    assert python(SPLIT.replace("CASES", str(cases))).splitlines() == answers
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")  # Read when jax is loaded.
    assert python(SPLIT.replace("CASES", str(cases[:1]))) == "False 2\n"


def test_devices_are_those_of_a_split_cpu_only_where_a_cpu_trains(monkeypatch):
    assert not is_split()
    monkeypatch.setattr("sast_jax.devices._is_split", True)
    assert is_split()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not is_split()


@pytest.mark.parametrize(
    ("fields", "is_shared"),
    [
        ([], True),
        (["network.kind=mlp"], False),
        (["spikes.hard_share=0.5"], False),
        (["sam.ascent=per_device"], False),  # Or it would be another algorithm on another number of cores.
    ],
)
def test_cores_share_samples_where_that_changes_nothing_but_speed(tiny, monkeypatch, fields, is_shared):
    monkeypatch.setattr("sast_jax.training.loop.is_split", lambda: True)
    monkeypatch.setattr("sast_jax.training.loop.make_mesh", lambda num_parts: num_parts)
    task = SimpleNamespace(config=tiny("sast", "network.kind=conv", "batch_size=8", *fields), perturbation_batch_size=4)
    assert _mesh_of_samples(task) == (4 if is_shared else None)


COMMANDS = """
import os, sys
import jax
os.sched_getaffinity = lambda process: {0, 1}
from sast_jax.cli import main

folder, suites, *overrides = sys.argv[1:]
for kind in ("conv", "mlp"):
    main(["train", "--config=configs/nmnist.py:sast", f"--workdir={folder}/{kind}", *overrides, f"--config.network.kind={kind}"])
main(["evaluate", f"--workdir={folder}/conv", f"--suite={suites}"])
assert len(jax.devices()) == 2
"""


@pytest.mark.parametrize("suites", ["transfer", pytest.param("transfer,calibration", marks=pytest.mark.slow)])
def test_commands_share_convolutions_among_cores_and_not_dense_layers(tiny, small_nmnist, tmp_path, suites):
    fields = ("batch_size=8", "num_epochs=3", "network.features=4")
    overrides = [f"--config.{each}" for each in (*TINY, f"dataset.root={small_nmnist}", *fields)]
    command = [sys.executable, "-c", COMMANDS, str(tmp_path), suites, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [load_run(tmp_path / kind).results["num_devices"] for kind in ("conv", "mlp")] == [2, 1]
    assert train_and_evaluate(tiny("sast", "network.kind=conv", *fields), tmp_path / "one")["num_devices"] == 1
    assert_runs_equal(tmp_path / "conv", tmp_path / "one")

    on_two = json.loads((tmp_path / "conv" / "evaluation.json").read_text())
    on_one = evaluate_run(tmp_path / "conv", suites.split(","))
    for suite in on_one:
        a, b = numbers(on_one[suite]), numbers(on_two[suite])
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_devices_share_an_evaluation_but_cores_not_that_of_dense_layers(monkeypatch):
    monkeypatch.setattr("sast_jax.evaluation.outputs.make_mesh", lambda num_parts: num_parts)
    networks = SpikingConvNet(3), SpikingMLP(3)
    assert [sharing_devices(network, 8) for network in networks] == [8, 8]
    monkeypatch.setattr("sast_jax.evaluation.outputs.is_split", lambda: True)
    assert [sharing_devices(network, 8) for network in networks] == [8, None]


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is one device")
def test_command_trains_on_a_device_per_core_of_a_busy_machine(tmp_path):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "sast_jax", "train", "--config=configs/digits.py:baseline", f"--workdir={tmp_path / 'run'}"]
    try:
        done = subprocess.run(
            [*command, "--config.num_epochs=2"], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_run(tmp_path / "run").results["num_devices"] > 1


@pytest.mark.slow
@pytest.mark.usefixtures("four_devices")
def test_runs_on_four_devices_equal_those_on_one(tiny, small_nmnist, tmp_path):
    overrides = [*TINY, f"dataset.root={small_nmnist}", "num_epochs=2", "batch_size=8"]
    command = [sys.executable, "-c", RUNS, str(tmp_path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["4", "{(4, 4)}"]
    for seed in (0, 3):
        train_and_evaluate(tiny("sast", "num_epochs=2", "batch_size=8", f"seed={seed}"), tmp_path / f"alone{seed}")
        assert_runs_equal(tmp_path / str(seed), tmp_path / f"alone{seed}")
    assert_runs_equal(tmp_path / "one", tmp_path / "alone0")


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_run_of_two_processes_equals_that_of_one_and_can_be_resumed(tiny, small_nmnist, tmp_path):
    overrides = [*TINY, f"dataset.root={small_nmnist}", "num_epochs=4", "checkpoint_every_epochs=1"]

    def start():
        port = free_port()
        command = [sys.executable, "-m", "sast_jax", "train", "--config=configs/nmnist.py:sast", f"--workdir={tmp_path / 'two'}"]
        return [
            subprocess.Popen(
                [*command, f"--hosts=localhost:{port},{index},2", *(f"--config.{each}" for each in overrides)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (0, 1)
        ]

    def finish():
        outputs = []
        for process in start():
            output, error = process.communicate(timeout=300)
            assert process.returncode == 0, error[-3000:]
            outputs.append(output)
        return outputs

    outputs = finish()
    assert ["Results:" in output for output in outputs] == [True, False]
    train_and_evaluate(tiny("sast", "num_epochs=4"), tmp_path / "one")
    assert json.loads((tmp_path / "two" / "results.json").read_text())["num_devices"] == 2
    assert_runs_equal(tmp_path / "two", tmp_path / "one")
    assert load_run(tmp_path / "two").step == 12

    (tmp_path / "two" / "results.json").unlink()  # As if killed after its last checkpoint.
    finish()
    assert_runs_equal(tmp_path / "two", tmp_path / "one")


def test_one_device_is_no_mesh():
    assert make_mesh(8) is None


@pytest.mark.parametrize("address", ["", "here", "localhost:1,2,2", "localhost,0,2"])
def test_address_that_cannot_be_read_is_a_message(address):
    with pytest.raises(UserError, match="--hosts: must be auto or HOST:PORT,INDEX,NUMBER"):
        connect_hosts(address)


def test_perturbation_by_each_device_is_refused_with_plain_steps(capsys, tmp_path):
    command = ["train", "--config=configs/digits.py:sast", f"--workdir={tmp_path / 'run'}", "--config.sam.ascent=per_device"]
    assert main([*command, "--config.sam.every_steps=2"]) == 2
    assert "sam.ascent: per_device needs a gradient for the perturbation at every step" in capsys.readouterr().err
