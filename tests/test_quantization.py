from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax import SpikingConvNet, SpikingMLP
from sast_jax.data import Recordings, load_dataset
from sast_jax.evaluation.outputs import predict_logits, trace
from sast_jax.evaluation.quantization import evaluate_quantization, potential_ranges, quantize, reference, simulate
from tests.weights import random_params

NUM_TIME_STEPS = 6
WIDE = {"weight_bits": 8, "num_time_steps": NUM_TIME_STEPS, "max_input": 2}


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 3, (5, NUM_TIME_STEPS, 9, 8, 2)).astype(np.uint8)
    return Recordings(frames, rng.integers(0, 3, 5).astype(np.int32), np.array(list("abcde")))


def init(network, recordings, seed=0):
    return random_params(network, recordings.frames.shape[2:], seed=seed, bias=0.1)


def assert_equals_reference(quantized, frames):
    outputs = simulate(quantized, frames), reference(quantized, frames)
    jax.tree.map(np.testing.assert_array_equal, *outputs)
    for array in jax.tree.leaves(outputs[1]):
        assert np.abs(array).max() < 2**31
    return outputs[1]


def quantize_or_say_why(*arguments, **options):
    try:
        return quantize(*arguments, **options)
    except ValueError as error:
        return str(error)


SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("zero", "rate"), ("subtract", "leaky"), ("none", "rate"))]


@pytest.mark.parametrize(("reset", "readout"), [("zero", "leaky"), ("subtract", "rate"), ("none", "leaky"), *SLOW])
def test_simulation_equals_the_reference_on_every_layer_and_step(reset, readout, samples):
    network = SpikingConvNet(
        num_classes=3, features=(4, 5), kernel_size=3, reset=reset, readout=readout, readout_decay=0.7, order="layer_major"
    )
    params = init(network, samples)
    ranges = potential_ranges(network, params, samples)
    for granularity, decay_form, bits in (("channel", "fraction", 8), ("tensor", "power", 4)):
        choice = {**WIDE, "weight_bits": bits, "granularity": granularity, "decay_form": decay_form}
        quantized = quantize(network, params, **choice, ranges=ranges)
        output = assert_equals_reference(quantized, samples.frames.swapaxes(0, 1))
        assert all(0 < spikes.mean() < 1 for spikes in output.spikes)
        assert len(output.potentials) == len(network.layer_names)


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "channel"]),
    decay_form=st.sampled_from(["fraction", "power"]),
    integer_bits=st.integers(6, 12),
    fraction_bits=st.integers(0, 6),
)
@settings(max_examples=25, deadline=None)
def test_simulation_equals_the_reference_in_any_format_and_saturated(
    seed, bits, granularity, decay_form, integer_bits, fraction_bits
):
    rng = np.random.default_rng(seed)
    network = SpikingMLP(num_classes=3, features=(5,), threshold=0.3, reset="subtract", readout_decay=0.9)
    params = {
        name: {"kernel": rng.normal(0, 3, shape), "bias": rng.normal(0, 1, shape[1])}
        for name, shape in (("dense_0", (8, 5)), ("readout", (5, 3)))
    }
    frames = rng.integers(0, 256, (4, 2, 2, 2, 2))
    formats = [(integer_bits, fraction_bits), (12, 2)]
    choice = {"weight_bits": bits, "granularity": granularity, "decay_form": decay_form, "num_time_steps": 4}
    quantized = quantize_or_say_why(network, params, **choice, formats=formats)
    if isinstance(quantized, str):
        assert "do not fit" in quantized or "int32" in quantized
    else:
        assert_equals_reference(quantized, frames)


@pytest.mark.slow
def test_real_network_shape_on_real_recordings_equals_the_reference(nmnist_root):
    splits = load_dataset("nmnist", root=str(nmnist_root), num_time_steps=NUM_TIME_STEPS, num_validation=0)
    recordings = splits.test.take(np.arange(2))
    network = SpikingConvNet(num_classes=10, init_gain=4.0)
    params = init(network, recordings)
    quantized = quantize(
        network, params, weight_bits=8, ranges=potential_ranges(network, params, recordings), num_time_steps=NUM_TIME_STEPS
    )
    output = assert_equals_reference(quantized, recordings.frames.swapaxes(0, 1))
    assert all(spikes.any() for spikes in output.spikes)


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_network_that_needs_no_rounding_is_reproduced_exactly(reset, samples):
    """Weights and biases in multiples of 2^-4 up to 127/16, decay 1/2: as long as n covers the halvings nothing is rounded."""
    network = SpikingConvNet(
        num_classes=3, features=(4, 5), kernel_size=3, decay=0.5, reset=reset, readout_decay=0.5, threshold=2.0
    )
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: rng.integers(-40, 41, p.shape).astype(np.float32) / 16, init(network, samples))
    for layer in params.values():
        layer["kernel"].flat[: layer["kernel"].shape[-1]] = 127 / 16  # For each output channel: the scale is 1/16.
        layer["kernel"][(0,) * (layer["kernel"].ndim - 1)] = 127 / 16
    formats = [(13, NUM_TIME_STEPS - 1)] * 3
    frames = samples.frames.swapaxes(0, 1)
    for granularity in ("tensor", "channel"):
        quantized = quantize(network, params, **WIDE, granularity=granularity, formats=formats)
        output = simulate(quantized, frames)
        for index, state in enumerate(trace(network, params, frames, "hard")):
            unit = 1 / 16 / network.pool_area(index) / 2 ** (NUM_TIME_STEPS - 1)
            np.testing.assert_array_equal(output.potentials[index] * unit, state.potential)
        for ours, theirs in zip(output.spikes, trace(network, params, frames, "hard"), strict=False):
            np.testing.assert_array_equal(ours, theirs.spikes)
        logits = np.asarray(output.logits) / 16 / 4 / 2 ** (NUM_TIME_STEPS - 1) / NUM_TIME_STEPS
        np.testing.assert_allclose(logits, predict_logits(network, params, samples, "hard"), rtol=1e-6)


def test_more_bits_come_closer_and_quantising_changes_something(samples):
    network = SpikingConvNet(num_classes=3, features=(4, 5), kernel_size=3, init_gain=4.0)
    params = init(network, samples)
    ranges = potential_ranges(network, params, samples)
    frames = samples.frames.swapaxes(0, 1)
    exact = np.asarray(trace(network, params, frames, "hard")[0].potential)
    errors = []
    for bits in (3, 4, 6, 8):
        quantized = quantize(network, params, **{**WIDE, "weight_bits": bits}, ranges=ranges)
        kernel, layer = np.asarray(params["conv_0"]["kernel"]), quantized.layers[0]
        unit = np.abs(kernel).max((0, 1, 2)) / (2 ** (bits - 1) - 1) / 2 ** layer.format[1]
        assert np.abs(layer.kernel).max() == 2 ** (bits - 1) - 1
        errors.append(np.abs(np.asarray(simulate(quantized, frames).potentials[0][0]) * unit - exact[0]).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0
    assert errors[0] > 10 * errors[-1]


def test_channel_of_tiny_weights_takes_no_bits_from_the_others(samples):
    network = SpikingMLP(num_classes=3, features=(6,))
    params = init(network, samples)
    ranges = potential_ranges(network, params, samples)
    before = quantize(network, params, **WIDE, ranges=ranges).layers[0]
    params["dense_0"]["kernel"][:, 0] *= 1e-6
    ranges[0] = ranges[0] * np.array([0, 1, 1, 1, 1, 1])
    after = quantize(network, params, **WIDE, ranges=ranges).layers[0]
    np.testing.assert_array_equal(after.kernel[:, 1:], before.kernel[:, 1:])
    assert not after.kernel[:, 0].any()
    assert after.threshold[0] == 2 ** (10 + after.format[1])
    assert before.format[1] - after.format[1] <= 3
    assert_equals_reference(quantize(network, params, **WIDE, ranges=ranges), samples.frames.swapaxes(0, 1))


@pytest.mark.parametrize(
    ("decay", "form", "expected"),
    [
        (0.9, "fraction", Fraction(230, 256)),
        (0.9, "power", Fraction(7, 8)),
        (0.95, "power", Fraction(15, 16)),
        (0.0, "power", 0),
        (1.0, "power", 1),
        (1.0, "fraction", 1),
    ],
)
def test_decay_is_the_nearest_of_its_form(decay, form, expected, samples):
    network = SpikingMLP(num_classes=3, features=(4,), decay=decay)
    layer = quantize(network, init(network, samples), **WIDE, decay_form=form, formats=[(10, 4), (14, 0)]).layers[0]
    assert Fraction(layer.decay[0], 2 ** layer.decay[1]) == expected


def test_potential_decays_with_rounding_to_nearest_ties_upwards():
    network = SpikingMLP(num_classes=1, features=(2,), decay=0.875, reset="none", threshold=1e3)
    params = {
        "dense_0": {"kernel": np.array([[1.0, -1.0]]), "bias": np.zeros(2)},
        "readout": {"kernel": np.ones((2, 1)), "bias": np.zeros(1)},
    }
    quantized = quantize(network, params, weight_bits=2, decay_form="power", formats=[(12, 0), (8, 0)], num_time_steps=5)
    frames = np.array([20, 0, 0, 0, 0]).reshape(5, 1, 1, 1, 1)
    potentials = np.asarray(simulate(quantized, frames).potentials[0])[:, 0]
    expected = [[20, -20]]
    for _ in range(4):
        expected.append([int(np.floor(Fraction(7, 8) * u + Fraction(1, 2))) for u in expected[-1]])
    np.testing.assert_array_equal(potentials, expected)
    assert expected[1] == [18, -17]  # 17.5 and -17.5: ties go up.


def test_what_could_overflow_is_refused_and_one_bit_less_is_right():
    network = SpikingMLP(num_classes=1, features=(1,), decay=1.0, reset="subtract")
    params = {
        "dense_0": {"kernel": np.ones((64, 1)), "bias": np.ones(1)},
        "readout": {"kernel": np.ones((1, 1)), "bias": np.zeros(1)},
    }
    choice = {"weight_bits": 8, "decay_form": "power", "num_time_steps": 3}
    frames = np.full((3, 1, 8, 8, 1), 255, np.uint8)
    accepted = []
    for bits in range(4, 22):
        quantized = quantize_or_say_why(network, params, **choice, formats=[(10, bits), (10, 0)])
        if isinstance(quantized, str):
            assert "a current and the potential could reach" in quantized
        else:
            accepted.append(bits)
            assert_equals_reference(quantized, frames)
    largest = 64 * 127 * 255 + 127 + 127 + 1024  # Weights, bias, threshold and potential, in units of 2^-n.
    assert accepted == [bits for bits in range(4, 22) if largest * 2**bits < 2**31]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 9}, "weight_bits must be 2 to 8; got 9"),
        ({"granularity": "row"}, "granularity must be one of tensor, channel; got 'row'"),
        ({"decay_form": "half"}, "decay_form must be one of fraction, power; got 'half'"),
        ({"formats": [(2, 0), (10, 0)]}, "dense_0: thresholds from .* do not fit into Q2.0, which holds 1 to 3"),
        ({"formats": [(10, 14), (10, 0)], "decay_form": "fraction"}, "a potential times its decay could reach"),
        ({"formats": [(10, 0), (16, 14)]}, "the sum of a readout's potentials could reach"),
        ({"formats": None}, "give either formats or ranges"),
    ],
)
def test_wrong_argument_or_format_is_refused(arguments, message, samples):
    network = SpikingMLP(num_classes=3, features=(4,))
    with pytest.raises(ValueError, match=message):
        quantize(network, init(network, samples), **{**WIDE, "formats": [(10, 4), (14, 0)], **arguments})


def test_frames_other_than_the_bounds_were_made_for_are_refused(samples):
    network = SpikingMLP(num_classes=3, features=(4,))
    quantized = quantize(network, init(network, samples), **WIDE, formats=[(10, 4), (14, 0)])
    frames = samples.frames.swapaxes(0, 1)
    for run in (simulate, reference):
        with pytest.raises(ValueError, match="frames must be 0 to 2; got 0 to 4"):
            run(quantized, 2 * frames)
        with pytest.raises(ValueError, match="frames must be 6 of an integer dtype; got 5 of uint8"):
            run(quantized, frames[1:])
        with pytest.raises(ValueError, match="got 6 of float32"):
            run(quantized, frames.astype(np.float32))


@pytest.mark.slow
def test_evaluation_measures_each_configuration(samples):
    network = SpikingConvNet(num_classes=3, features=(4, 5), kernel_size=3)
    params = init(network, samples)
    configurations = ((8, "channel", "fraction"), (4, "tensor", "power"))
    result = evaluate_quantization(network, params, samples, samples, max_input=2, configurations=configurations)
    fine, coarse = result["configurations"]
    num_weights, num_neurons = 3 * 3 * 2 * 4 + 3 * 3 * 4 * 5 + 2 * 2 * 5 * 3, 9 * 8 * 4 + 4 * 4 * 5
    assert result["float"]["memory"]["weights"] == 4 * num_weights
    assert fine["memory"]["weights"] == num_weights == 2 * coarse["memory"]["weights"]
    assert fine["memory"]["biases"] == 4 * (4 + 5 + 3)
    assert fine["memory"]["thresholds"] == 4 * (4 + 5)
    assert coarse["memory"]["thresholds"] == 4 * 2
    formats = {name: sum(layer[f"{key}_bits"] for key in ("integer", "fraction")) for name, layer in fine["layers"].items()}
    assert formats["conv_0"] == formats["conv_1"] == 15
    assert fine["memory"]["potentials"] == 2 * num_neurons + int(np.ceil(3 * (1 + formats["readout"]) / 8))
    assert coarse["layers"]["conv_0"]["decay"] == 0.875
    for row in result["configurations"]:
        assert row["reference"] == {"num_compared": 4, "equal": True}
        assert 0 <= row["accuracy"] <= 1
        assert row["synops"]["dense"] == result["float"]["synops"]["dense"]
        assert row["synops"]["effective_macs"] > 0
    assert fine["agreement"] >= coarse["agreement"]
