r"""What calibration alone does for the hard network: thresholds, gains and a temperature, on frozen weights.

A calibration part, never the test part, decides everything. With :math:`a_c` the mean output of channel :math:`c` over neurons,
steps and recordings in surrogate mode, :math:`r_c` its spike rate in hard mode, and layers taken from first to last, each
in the network whose earlier layers are calibrated already:

==================================  ==================================================================================
method                              what it sets
==================================  ==================================================================================
`none`                              nothing: the swap alone
`threshold_layer` and `_channel`    thresholds at which :math:`r = a`, by bisection, on average or for every channel
`gain_layer` and `_channel`         gains :math:`a / r`, which restore the mean input of the next layer
`search_layer`                      one threshold and one gain a layer: greedy search over a grid, by calibration loss
`gradient_channel`                  all thresholds and gains: from there on, straight-through descent of calibration loss
==================================  ==================================================================================

The last two fit labels, and the last one can overfit a small part: its loss there says nothing about other recordings.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sast_jax.data import DESCENT, Recordings, batch_indices, take_batch
from sast_jax.evaluation.outputs import apply, map_recordings, predict_logits, score
from sast_jax.networks import Calibration, SpikingNetwork

WITHOUT_LABELS = ("none", "threshold_layer", "threshold_channel", "gain_layer", "gain_channel")
"""Methods whose settings do not depend on labels, so that the calibration part's loss can judge between them."""

NUM_BINS = 15

FACTORS = 2.0 ** np.arange(-3, 1.5, 0.5)
"""Grid of `search_layer`: multiples of the threshold, and their inverses as gains."""

_MAX_CHANGE = 16.0  # Factor by which a threshold or a gain may change: a silent channel would ask for more than any.
_NUM_BISECTIONS = 9
_NUM_ROUNDS = 2
_NUM_STEPS, _DESCENT_BATCH_SIZE, _LEARNING_RATE = 60, 50, 0.05


def evaluate_calibration(
    network: SpikingNetwork,
    params: Any,
    calibration: Recordings,
    test: Recordings,
    *,
    split: str = "validation",
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Calibrates the hard network in several ways on one part, and evaluates them on another.

    Args:
        network: The network.
        params: Its weights, which stay as they are.
        calibration: Recordings on which everything is decided.
        test: Recordings on which everything is measured, disjoint from them.
        split: Where the calibration part comes from, for the record.
        report: Called with the name of the method that comes next.

    Returns:
        `calibration` of `sast_jax.evaluation`.
    """

    def measure(mode, settings=None):
        logits = {part: predict_logits(network, params, each, mode, settings) for part, each in parts.items()}
        temperature = fit_temperature(logits["calibration"], calibration.labels)
        scaled = {part: each / temperature for part, each in logits.items()}
        probabilities = {name: jax.nn.softmax(each["test"]) for name, each in (("ece", logits), ("scaled_ece", scaled))}
        return {
            **score(logits["test"], test.labels),
            "temperature": temperature,
            "scaled_loss": score(scaled["test"], test.labels)["loss"],
            **{name: expected_calibration_error(np.asarray(each), test.labels) for name, each in probabilities.items()},
            **{f"calibration_{key}": value for key, value in score(logits["calibration"], calibration.labels).items()},
            "calibration_scaled_loss": score(scaled["calibration"], calibration.labels)["loss"],
        }

    parts = {"calibration": calibration, "test": test}
    surrogate = measure("surrogate")
    settings = {"none": _start(network, params, calibration)}
    for name in WITHOUT_LABELS[1:]:
        report(name)
        what, granularity = name.split("_")
        settings[name] = match(network, params, calibration, settings["none"], what=what, per_channel=granularity == "channel")
    report("search_layer")
    settings["search_layer"] = search(network, params, calibration, settings["none"])
    report("gradient_channel")
    settings["gradient_channel"] = descend(network, params, calibration, settings["search_layer"])
    methods = {name: measure("hard", each) for name, each in settings.items()}
    swapped = methods["none"]["accuracy"]
    gap = surrogate["accuracy"] - swapped
    for name, method in methods.items():
        method["gap_removed"] = (method["accuracy"] - swapped) / gap if gap > 0 else None
        method |= {key: _listed(network, value, name) for key, value in settings[name]._asdict().items()}
    return {
        "split": split,
        "num_calibration": len(calibration.labels),
        "num_test": len(test.labels),
        "num_bins": NUM_BINS,
        "surrogate": surrogate,
        "methods": methods,
        "chosen": min(WITHOUT_LABELS, key=lambda name: methods[name]["calibration_scaled_loss"]),
    }


def _listed(network, values, name):
    """Values by layer, as a list of one number, or of one per channel where a method sets them apart."""
    return {
        layer: [float(v) for v in (value if name.endswith("channel") else value[:1])]
        for layer, value in zip(network.layer_names, values, strict=False)
    }


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    r"""Mean distance of confidence from accuracy.

    .. math:: \mathrm{ECE} = \sum_{m=1}^{M} \frac{|B_m|}{N} \, \bigl| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \bigr|

    with :math:`B_m` the recordings whose highest probability is in :math:`((m-1)/M, m/M]`.

    Args:
        probabilities: `[N, K]`.
        labels: `[N]`.
        num_bins: M.

    Returns:
        A number in [0, 1].

    References:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017, equation 3.
    """
    confidence = probabilities.max(-1)
    excess = confidence - (probabilities.argmax(-1) == labels)
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence)
    return float(np.abs(np.bincount(bins, excess, num_bins)).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the number in [0.01, 100] by which logits `[N, K]` are divided for the lowest mean cross-entropy.

    References:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017, section 4.2.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits = np.asarray(logits, np.float64)

    def loss(log_temperature):
        return -log_softmax(logits / np.exp(log_temperature), -1)[np.arange(len(labels)), labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=np.log([0.01, 100.0]), method="bounded").x))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _channel_means(network, params, frames, mode, settings):
    spikes = apply(network, params, frames, mode, settings).spikes
    return [jnp.mean(s, (0, *range(2, s.ndim - 1))) for s in spikes]


def channel_means(network, params, recordings, mode, settings=None) -> list[np.ndarray]:
    """Returns the mean output `[C]` of each channel of each layer over steps, neurons and recordings."""
    means = map_recordings(network, lambda frames: _channel_means(network, params, frames, mode, settings), recordings)
    return [each.mean(0, dtype=np.float64) for each in means]


def _start(network, params, recordings):
    """The network's own thresholds, and gains of 1, with one number for each channel."""
    channels = [len(each) for each in channel_means(network, params, recordings.take(np.arange(1)), "hard")]
    ones = tuple(np.ones(number, np.float32) for number in channels)
    return Calibration(tuple(network.threshold * each for each in ones), ones)


def match(
    network: SpikingNetwork, params: Any, recordings: Recordings, start: Calibration, *, what: str, per_channel: bool
) -> Calibration:
    """Sets thresholds or gains, layer by layer, so that the mean outputs of the two modes agree.

    Args:
        network: The network.
        params: Its weights.
        recordings: Calibration part.
        start: Thresholds and gains to start from, `[C]` each.
        what: `threshold`: spike rates become the surrogate's mean outputs, as far as a change by a factor of 16 allows;
            `gain`: rates times gains do.
        per_channel: Whether every channel is matched, or only the mean over the channels of a layer.

    Returns:
        The thresholds and gains.
    """

    def average(values):
        return values if per_channel else np.full_like(values, values.mean())

    def rates(index):
        return average(channel_means(network, params, recordings, "hard", Calibration(tuple(thresholds), tuple(gains)))[index])

    thresholds, gains = list(start.thresholds), list(start.gains)
    for index, mean in enumerate(channel_means(network, params, recordings, "surrogate")):
        target = average(mean)
        if what == "gain":
            gains[index] = np.clip(target / np.maximum(rates(index), 1e-9), 1 / _MAX_CHANGE, _MAX_CHANGE).astype(np.float32)
            continue
        low, high = start.thresholds[index] / _MAX_CHANGE, start.thresholds[index] * _MAX_CHANGE
        for _ in range(_NUM_BISECTIONS):  # A higher threshold gives fewer spikes, but for rare effects of the reset.
            thresholds[index] = np.sqrt(low * high)
            is_low = rates(index) > target
            low, high = np.where(is_low, thresholds[index], low), np.where(is_low, high, thresholds[index])
    return Calibration(tuple(thresholds), tuple(gains))


def search(network: SpikingNetwork, params: Any, recordings: Recordings, start: Calibration) -> Calibration:
    """Searches one threshold and one gain for each layer: a coordinate at a time over `FACTORS`, twice around.

    What is lowered is the cross-entropy on the calibration part at the best temperature.
    """
    number = network.num_spiking

    def settings(factors):
        values = [np.float32(f) * v for f, v in zip(factors, (*start.thresholds, *start.gains), strict=True)]
        return Calibration(tuple(values[:number]), tuple(values[number:]))

    @functools.cache
    def loss(factors):
        logits = predict_logits(network, params, recordings, "hard", settings(factors))
        return score(logits / fit_temperature(logits, recordings.labels), recordings.labels)["loss"]

    best = (1.0,) * (2 * number)
    for _ in range(_NUM_ROUNDS):
        for layer in range(number):
            for position, grid in ((layer, FACTORS), (number + layer, 1 / FACTORS)):
                changed = [(*best[:position], float(factor), *best[position + 1 :]) for factor in grid]
                best = min([best, *changed], key=loss)
    return settings(best)


def descend(network: SpikingNetwork, params: Any, recordings: Recordings, start: Calibration) -> Calibration:
    """Lowers cross-entropy on the calibration part over all thresholds and gains by straight-through gradients.

    Adam on the logarithms of both, so that they stay positive; the weights get no gradient.
    """
    logarithms = jax.tree.map(jnp.log, start)
    state = _descent.init(logarithms)
    size = min(_DESCENT_BATCH_SIZE, len(recordings.labels))
    for number in range(_NUM_STEPS):
        indices = batch_indices(len(recordings.labels), size, seed=0, stream=DESCENT, step=number)
        logarithms, state = _descent_step(network, params, logarithms, state, take_batch(recordings, indices))
    return jax.tree.map(lambda value: np.exp(np.asarray(value)), logarithms)


_descent = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _NUM_STEPS))


@functools.partial(jax.jit, static_argnums=0)
def _descent_step(network, params, logarithms, state, batch):
    def loss(logarithms):
        settings = jax.tree.map(jnp.exp, logarithms)
        logits = apply(network, params, batch.frames, "straight_through", settings).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    updates, state = _descent.update(jax.grad(loss)(logarithms), state)
    return optax.apply_updates(logarithms, updates), state
