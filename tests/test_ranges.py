"""Numbers out of their range are refused wherever they are known, once for all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sast_jax import FAMILIES, SpikingConvNet, SpikingMLP, SurrogateFamily, leaky_readout, lif, lif_init, lif_step, spike_fn
from sast_jax.pallas import lif_pallas
from sast_jax.theory import contraction_factor, layer_bounds, max_current, reachable_potentials, smoothness_bounds, state_bound
from sast_jax.theory.neuron import max_second_derivative

CURRENT = jnp.full((3, 2), 0.6)
HARD = spike_fn("hard")


def step(**neuron):
    return lif_step(lif_init(CURRENT[0]), CURRENT[0], **{"decay": 0.9, "spike_fn": HARD, **neuron})


LAYERS = {
    "lif": lambda **neuron: lif(CURRENT, **{"decay": 0.9, "spike_fn": HARD, **neuron}),
    "lif_step": step,
    "lif_pallas": lambda **neuron: lif_pallas(CURRENT, **{"decay": 0.9, "spike_fn": HARD, **neuron}),
    "mlp": lambda **neuron: _init(SpikingMLP(3, features=(2,), **neuron)),
    "conv": lambda **neuron: _init(SpikingConvNet(3, features=(2,), order="step_major", **neuron)),
    "theory": lambda **neuron: contraction_factor(
        **{"decay": 0.9, "threshold": 1.0, "reset": "zero", "family": "arctan", "slope": 2.0, **neuron}
    ),
}


def _init(network):
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 1, 8, 8, 2)))


@pytest.mark.parametrize("layer", LAYERS)
def test_decay_threshold_and_reset_are_checked_in_each_layer(layer):
    for decay in (2.0, -0.1, float("nan"), np.float32(1.5)):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]; got "):
            LAYERS[layer](decay=decay)
    for threshold in (-1, 0.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be positive; got "):
            LAYERS[layer](threshold=threshold)
    with pytest.raises(ValueError, match="reset must be one of zero, subtract, none; got 'soft'"):
        LAYERS[layer](reset="soft")


@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_one_wrong_entry_of_an_array_is_enough(kind):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]; got .*0.5.*1.5"):
        step(decay=kind([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        leaky_readout(jnp.ones((3, 1, 2)), kind([0.5, -0.5]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slope", 0.0, "slope must be positive and finite; got 0.0"),
        ("slope", float("inf"), "slope must be positive and finite; got inf"),
        ("readout_decay", 1.1, r"readout_decay must be in \[0, 1\]; got 1.1"),
        ("init_gain", float("nan"), "init_gain must be a finite number >= 0; got nan"),
        ("decay", "0.9", r"decay must be in \[0, 1\]; got '0.9'"),
        ("decay", None, r"decay must be in \[0, 1\]; got None"),
    ],
)
def test_numbers_of_a_network_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        _init(SpikingMLP(3, features=(2,), **{field: value}))


def test_ends_of_the_ranges_are_allowed():
    for decay in (0, 1, 0.0, 1.0, True, np.int32(1), jnp.bfloat16(1.0)):
        step(decay=decay)
    step(threshold=jnp.inf)  # A neuron that never spikes.


def test_numbers_that_are_traced_are_let_through():
    spikes = jax.jit(lambda decay: lif(CURRENT, decay=decay, spike_fn=HARD)[0])(2.0)
    assert spikes.shape == CURRENT.shape
    assert jax.grad(lambda decay: step(decay=decay).potential.sum())(0.5) == 0.0


def step_of_own_family(x, slope):
    return jax.nn.sigmoid(slope * x)


@pytest.fixture
def own_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "own", SurrogateFamily(*[step_of_own_family] * 2, lambda k: k / 4, lambda k: k**2))


@pytest.mark.usefixtures("own_family")
def test_theory_refuses_a_family_that_it_does_not_cover():
    neuron = {"decay": 0.9, "threshold": 1.0, "reset": "zero", "family": "own", "slope": 2.0}
    network = SpikingMLP(3, features=(2,), family="own")
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((2, 1, 2, 2, 2)))["params"]
    frames = np.zeros((2, 2, 2))
    for bound in (
        lambda: contraction_factor(**neuron),
        lambda: reachable_potentials(0.0, 1.0, 3, **neuron),
        lambda: max_current(0.1, **neuron),
        lambda: max_second_derivative(**neuron),
        lambda: layer_bounds(network, params, frames, frames + 1, 3),
        lambda: smoothness_bounds(network, params, np.ones((2, 1, 2, 2, 2))),
    ):
        with pytest.raises(
            ValueError, match="family must be one of arctan, logistic, fast_sigmoid, which the theory covers; got 'own'"
        ):
            bound()
    assert float(state_bound(1.0, decay=0.5, threshold=1.0, reset="zero")) == 2.0  # It holds whatever the family.
