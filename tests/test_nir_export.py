import functools
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax import Calibration, SpikingConvNet, SpikingMLP, load_run
from sast_jax.cli import main
from sast_jax.data import load_dataset
from sast_jax.errors import UserError
from sast_jax.nir_export import make_nir_graph, write_nir_graph
from tests.nir_simulator import simulate
from tests.test_cli import refused, train  # noqa: F401  The fixture that trains a tiny network.
from tests.weights import random_params

KINDS = {
    "conv": lambda **fields: SpikingConvNet(num_classes=3, **({"features": (3, 4), "kernel_size": 3} | fields)),
    "mlp": lambda **fields: SpikingMLP(num_classes=3, features=(7, 5), **fields),
}


def random_frames(seed=0, shape=(6, 2, 9, 7, 2)):
    return (np.random.default_rng(seed).random(shape) < 0.3).astype(np.float32)


def init(network, frames, gain=3.0):
    """Random weights and, unlike those at the start of training, random biases."""
    return random_params(network, frames.shape[2:], seed=1, gain=gain, bias=0.3)


@functools.partial(jax.jit, static_argnums=0)
def apply(network, params, frames, calibration=None):
    return network.apply({"params": params}, frames, "hard", calibration)


def read_back(graph, path):
    write_nir_graph(path, graph)
    return nir.read(path)


def spikes_of(graph, outputs):
    """Spikes of each layer as a network returns them, channels last."""
    spiking = [name for name, node in graph.nodes.items() if isinstance(node, nir.LIF | nir.IF | nir.Threshold)]
    in_order = [name for _, name in graph.edges if name in spiking]
    return [np.moveaxis(outputs[name], 2, -1) if outputs[name].ndim == 5 else outputs[name] for name in in_order]


def logits_of(graph, outputs):
    over_time = {"mean": np.mean, "sum": np.sum}[graph.metadata["logits"].partition(" ")[0]]
    return over_time(outputs["output"], axis=0)


def assert_same(network, params, frames, graph, calibration=None):
    """Equal spikes of every layer and logits up to rounding, with spikes that are neither all 0 nor all 1."""
    expected = apply(network, params, frames, calibration)
    outputs = simulate(graph, frames.transpose(0, 1, 4, 2, 3))
    spikes = spikes_of(graph, outputs)
    assert len(spikes) == len(expected.spikes)
    for ours, theirs in zip(expected.spikes, spikes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert 0 < np.mean(ours) < 1
    np.testing.assert_allclose(logits_of(graph, outputs), expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "decay", "reset", "fields"),
    [
        ("conv", 0.9, "zero", {}),
        ("conv", 0.0, "zero", {"readout": "rate", "kernel_size": 4}),
        ("conv", 0.8, "none", {"readout_decay": 0.7, "kernel_size": 1}),
        ("mlp", 1.0, "zero", {"readout_decay": 1.0}),
        ("mlp", 1.0, "none", {"readout": "rate"}),
        pytest.param("mlp", 0.9, "zero", {}, marks=pytest.mark.slow),
    ],
)
def test_graph_simulated_in_numpy_gives_the_same_spikes(kind, decay, reset, fields, tmp_path):
    frames = random_frames()
    network = KINDS[kind](decay=decay, reset=reset, threshold=0.8, **fields)
    params = init(network, frames)
    graph = make_nir_graph(network, params, frames.shape[2:])
    assert_same(network, params, frames, read_back(graph, tmp_path / "net.nir"))


@pytest.mark.parametrize(("kernel_size", "pool_size"), [(2, 1), (5, 3)])
def test_borders_of_convolution_and_pooling_are_the_same(kernel_size, pool_size):
    frames = random_frames(shape=(5, 2, 11, 10, 2))
    network = KINDS["conv"](kernel_size=kernel_size, pool_size=pool_size)
    params = init(network, frames)
    assert_same(network, params, frames, make_nir_graph(network, params, frames.shape[2:]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.875]))
def test_spikes_are_equal_where_a_potential_just_reaches_the_threshold(seed, decay):
    # Weights and decays are multiples of powers of two, so that both sides compute without rounding and ties are common.
    rng = np.random.default_rng(seed)
    frames = random_frames(seed, (5, 1, 6, 5, 2))
    network = KINDS["conv"](decay=decay)
    shapes = {"conv_0": (3, 3, 2, 3), "conv_1": (3, 3, 3, 4), "readout": (4, 3)}
    params = {
        name: {"kernel": rng.integers(-3, 5, shape) / 4, "bias": rng.integers(-1, 2, shape[-1]) / 4}
        for name, shape in shapes.items()
    }
    graph = make_nir_graph(network, params, frames.shape[2:])
    with jax.enable_x64(True):
        expected = apply(network, params, jnp.asarray(frames, jnp.float64))
    outputs = simulate(graph, frames.transpose(0, 1, 4, 2, 3))
    for ours, theirs in zip(expected.spikes, spikes_of(graph, outputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("kind", "readout"), [("conv", "leaky"), ("mlp", "rate")])
def test_calibrated_network_is_exported_with_its_thresholds_and_gains(kind, readout):
    frames = random_frames()
    network = KINDS[kind](readout=readout)
    params = init(network, frames)
    rng = np.random.default_rng(0)
    channels = [len(layer["bias"]) for name, layer in sorted(params.items())][: network.num_spiking]
    calibration = Calibration(*(tuple(rng.uniform(0.4, 1.2, n).astype(np.float32) for n in channels) for _ in range(2)))
    graph = make_nir_graph(network, params, frames.shape[2:], calibration)
    assert_same(network, params, frames, graph, calibration)
    one_each = Calibration((0.7,) * len(channels), (1.3,) * len(channels))
    assert_same(network, params, frames, make_nir_graph(network, params, frames.shape[2:], one_each), one_each)


@pytest.mark.slow
def test_real_recordings_give_the_same_spikes_and_predictions(nmnist_root):
    test = load_dataset("nmnist", num_time_steps=10, num_validation=0, root=str(nmnist_root)).test
    frames = test.frames[:10].transpose(1, 0, 2, 3, 4).astype(np.float32)
    network = SpikingConvNet(num_classes=10, features=(6, 8))
    params = init(network, frames)
    assert_same(network, params, frames, make_nir_graph(network, params, frames.shape[2:]))


def test_reset_by_subtraction_is_exported_with_a_warning():
    frames = random_frames()
    network = KINDS["mlp"](reset="subtract")
    params = init(network, frames)
    graph = make_nir_graph(network, params, frames.shape[2:])
    assert "NIR has no reset by subtraction" in graph.metadata["warning"]
    assert graph.metadata["reset"] == "subtract"
    assert "warning" not in make_nir_graph(KINDS["mlp"](), params, frames.shape[2:]).metadata
    # What the warning says: with reset zero the graph is the network's.
    assert_same(network.clone(reset="zero"), params, frames, graph)
    with pytest.raises(AssertionError):
        assert_same(network, params, frames, graph)


def test_unknown_network_is_refused():
    class Other(SpikingMLP):
        pass

    frames = random_frames()
    params = init(KINDS["mlp"](), frames)
    with pytest.raises(UserError, match="got Other"):
        make_nir_graph(Other(num_classes=3, features=(7, 5)), params, frames.shape[2:])


def test_missing_package_is_told_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(UserError, match=re.escape('pip install "sast_jax[export]"')):
        make_nir_graph(KINDS["mlp"](), {}, (9, 7, 2))


def test_failed_write_leaves_the_file_of_before(tmp_path, monkeypatch):
    frames = random_frames()
    network = KINDS["mlp"]()
    graph = make_nir_graph(network, init(network, frames), frames.shape[2:])
    (tmp_path / "net.nir").write_text("before")
    graph.nodes["input"].metadata = {"not HDF5": object()}
    with pytest.raises(TypeError):
        write_nir_graph(tmp_path / "net.nir", graph)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_command_exports_a_run_and_refuses_what_it_cannot_do(train, capsys, tmp_path):  # noqa: F811
    run, output = tmp_path / "run", tmp_path / "net.nir"
    assert "is no run" in refused(capsys, main(["export", f"--workdir={run}", f"--output={output}"]))
    assert train("--config.network.reset=subtract", config="configs/nmnist.py:sast") == 0
    capsys.readouterr()
    assert main(["export", f"--workdir={run}", f"--output={output}"]) == 0
    captured = capsys.readouterr()
    assert "sast-jax: warning: NIR has no reset by subtraction" in captured.err
    assert "input - dense_0_flatten - dense_0 - dense_0_LIF - readout - output; dt 0.0001, logits: mean" in captured.out
    graph = nir.read(output)
    assert (graph.metadata["num_time_steps"], graph.metadata["binary"]) == (3, True)
    trained = load_run(run)
    assert_same(trained.network.clone(reset="zero"), trained.params, random_frames(shape=(3, 4, 34, 34, 2)), graph)

    command = ["export", f"--workdir={run}", f"--output={output}"]
    assert "--suite=calibration" in refused(capsys, main([*command, "--calibration=chosen"]))
    thresholds = {"none": 1.0, "best": 0.5}
    measured = dict.fromkeys(("accuracy", "loss", "ece", "temperature", "scaled_loss", "scaled_ece"), 0.5)
    methods = {name: {**measured, "thresholds": {"dense_0": [t]}, "gains": {"dense_0": [2.0]}} for name, t in thresholds.items()}
    (run / "evaluation.json").write_text(
        json.dumps({"step": trained.step, "calibration": {"methods": methods, "chosen": "best", "surrogate": measured}})
    )
    assert "none, best, chosen; got 'other'" in refused(capsys, main([*command, "--calibration=other"]))
    assert main([*command, "--calibration=chosen"]) == 0
    capsys.readouterr()
    graph = nir.read(output)
    assert (graph.nodes["dense_0_LIF"].v_threshold == 0.5).all()
    np.testing.assert_allclose(graph.nodes["readout"].weight.T, 2 * trained.params["readout"]["kernel"], rtol=1e-6)

    assert str(tmp_path) in refused(capsys, main(["export", f"--workdir={run}", f"--output={tmp_path}"]))
    assert "export takes no config fields" in refused(capsys, main([*command, "--config.seed=1"]))


def readme_recipe():
    """The recipe of docs/deployment.md for reading a graph elsewhere, as it stands there."""
    return re.search(r"<!-- nir -->\n```python\n(.*?)```", Path("docs/deployment.md").read_text(), re.DOTALL).group(1)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["snntorch", "norse"])
@pytest.mark.parametrize("fields", [{}, {"kernel_size": 4, "pool_size": 3, "readout": "rate"}])
def test_other_libraries_give_the_same_spikes_and_predictions(library, fields, nmnist_root, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip(library)
    recordings = load_dataset("nmnist", num_time_steps=10, num_validation=0, root=str(nmnist_root)).test
    frames = recordings.frames[:20].transpose(1, 0, 2, 3, 4).astype(np.float32)
    network = SpikingConvNet(num_classes=10, **({"features": (6, 8)} | fields))
    params = init(network, frames)
    write_nir_graph(tmp_path / "net.nir", make_nir_graph(network, params, frames.shape[2:]))
    expected = apply(network, params, frames)

    recipe = readme_recipe()
    if library == "norse":
        line, other = re.search(r"^(net = .*?) +# Or in norse: (.*)$", recipe, re.M).groups()
        recipe = recipe.replace(line, other).replace("from snntorch.import_nir import import_from_nir", "import norse.torch")
    # Spikes are taken on the way, from whatever the library has made of a layer of neurons.
    recipe = recipe.replace("state, outputs = None, []", "listen(net)\nstate, outputs = None, []")
    spikes = {}

    def listen(net):
        for name, module in net.named_modules():
            if name.endswith("_LIF"):
                keep = spikes.setdefault(name, []).append
                module.register_forward_hook(
                    lambda _, __, output, keep=keep: keep(output[0] if type(output) is tuple else output)
                )

    monkeypatch.chdir(tmp_path)
    scope = {"frames": frames, "listen": listen}
    with redirect_stdout(io.StringIO()):
        exec(recipe, scope)
    assert len(spikes) == len(expected.spikes)
    for ours, theirs in zip(expected.spikes, spikes.values(), strict=True):
        theirs = torch.stack(theirs).numpy()
        np.testing.assert_array_equal(ours, np.moveaxis(theirs, 2, -1) if theirs.ndim == 5 else theirs)
        assert 0 < np.mean(ours) < 1
    logits = scope["logits"].numpy()
    if network.readout == "rate":
        logits = logits * len(frames)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected.logits.argmax(-1))
