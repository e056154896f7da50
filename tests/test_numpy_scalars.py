"""Numbers of NumPy where Python's are meant, and sizes that are not numbers yet."""

import json
import textwrap

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sast_jax import SpikingConvNet, SpikingMLP, leaky_readout, lif, rate_readout, spike_fn
from sast_jax.config import load_configs, set_field, to_json, with_plain_values
from sast_jax.errors import UserError
from sast_jax.pallas import lif_pallas

CONFIG = textwrap.dedent(
    """
    import runpy
    import ml_collections
    import numpy as np

    def get_config(variant=""):
        fields = runpy.run_path("configs/digits.py")["get_config"]("sast").to_dict()
        fields["sam"]["rho"] = {rho}
        fields["network"]["features"] = np.array([4, 5])
        fields |= {{"seed": np.int64(3), "test": np.bool_(False)}}
        return ml_collections.ConfigDict(fields)
    """
)


def test_config_file_may_compute_with_numpy(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(rho="np.geomspace(0.1, 1, 3)[0]"))
    config = load_configs(str(path))[""]
    assert (config.sam.rho, config.seed, config.network.features, config.test) == (0.1, 3, (4, 5), False)
    fields = (config.sam.rho, config.seed, config.network.features[0], config.test)
    assert [type(value) for value in fields] == [float, int, int, bool]
    assert json.loads(json.dumps(to_json(config)))["network"]["features"] == [4, 5]


def test_config_with_a_number_out_of_its_range_is_refused_all_the_same(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(rho="np.float64(-1)"))
    with pytest.raises(UserError, match=r"sam.rho: must be a finite number >= 0; got -1.0"):
        load_configs(str(path))


def test_config_made_in_python_is_taken_and_left_as_it_is():
    config = ml_collections.ConfigDict({"a": {"b": np.float64(0.5)}, "c": [np.int32(1), 2]}).lock()
    plain = with_plain_values(config)
    assert plain.is_locked
    assert (type(plain.a.b), plain.c) == (float, (1, 2))
    assert type(config.a.b) is np.float64
    assert with_plain_values(plain) is plain
    set_field(plain.unlock(), "a.b", np.float32(0.25))
    assert type(plain.a.b) is float


def exported(function, *shapes):
    """A function exported with the symbolic sizes `b` and `t`, as it is called."""
    from jax import export

    scope = export.SymbolicScope()
    specs = [jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), jnp.float32) for shape in shapes]
    return export.export(jax.jit(function))(*specs)


@pytest.mark.parametrize(
    "function",
    [
        lambda current: lif(current, decay=0.9, spike_fn=spike_fn("hard"))[0],
        lambda current: lif_pallas(current, decay=0.9, spike_fn=spike_fn("hard"))[0],
        lambda current: leaky_readout(current, 0.9),
        rate_readout,
    ],
    ids=["lif", "lif_pallas", "leaky_readout", "rate_readout"],
)
def test_neurons_and_readouts_are_exported_for_any_length_and_batch(function):
    program = exported(function, "t, b, 4")
    for size in (1, 5):
        current = np.random.default_rng(size).normal(size=(size + 1, size, 4)).astype(np.float32)
        np.testing.assert_allclose(program.call(current), function(current), rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "has_gradient"),
    [
        (SpikingMLP(3, features=(2,), order="step_major", readout="rate"), False),
        (SpikingConvNet(3, features=(2,), kernel_size=3, order="layer_major"), True),
        (SpikingConvNet(3, features=(2, 2), kernel_size=3, order="step_major", time_chunk=2), False),
    ],
    ids=["mlp", "conv", "conv_in_steps"],
)
def test_network_is_exported_for_any_batch_with_its_gradient(network, has_gradient):
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((3, 1, 4, 4, 2), np.float32))

    def logits(frames):
        return network.apply(params, frames, "hard").logits

    def gradient(frames):
        return jax.grad(lambda params: jnp.mean(network.apply(params, frames, "straight_through").logits ** 2))(params)

    function = gradient if has_gradient else logits
    program = exported(function, "3, b, 4, 4, 2")
    frames = np.random.default_rng(0).integers(0, 2, (3, 5, 4, 4, 2)).astype(np.float32)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6),
        program.call(frames),
        jax.jit(function)(frames),
    )
