"""What the metrics of an epoch say about training that runs and learns nothing."""

from collections.abc import Mapping

VANISHING_GRADIENT = 1e-7
EXPLODING_GRADIENT = 1e4
"""Norms of the gradient of a mean cross-entropy; in training that works they lie between 1e-3 and 1e2."""

VANISHING_SHARE = 1e-6
"""Of the largest gradient of a layer, in float32 hardly more than its rounding error."""


def find_symptoms(metrics: Mapping[str, float]) -> dict[str, str]:
    """Returns what looks wrong in the metrics of an epoch, and what to do, by a name that stays the same over epochs.

    Args:
        metrics: Means over the epoch's steps, as of `make_train_step`.
    """
    symptoms = {}
    for key, share in metrics.items():
        layer = key.removeprefix("above_threshold_")
        if key != layer and share == 0.0:
            symptoms[key] = (
                f"layer {layer} is dead: no potential rose above the threshold, so with hard spikes it is silent. Raise "
                "network.init_gain, or lower network.threshold or optimizer.learning_rate"
            )
        elif key != layer and share == 1.0:
            symptoms[key] = (
                f"layer {layer} is saturated: every neuron spikes at every step, so it tells nothing. Lower network.init_gain "
                "or optimizer.learning_rate, or raise network.threshold"
            )
    norm = metrics["gradient_norm"]
    if norm > EXPLODING_GRADIENT:
        symptoms["exploding"] = (
            f"the gradient explodes: its norm is {norm:.1e}. Lower network.decay, network.slope or optimizer.learning_rate"
        )
    if norm < VANISHING_GRADIENT and metrics["accuracy"] < 1.0:
        symptoms["vanishing"] = (
            f"the gradient vanishes: its norm is {norm:.1e} at an accuracy of {metrics['accuracy']:.1%}. Lower network.slope, or "
            "raise network.init_gain"
        )
        return symptoms
    prefix = "gradient_norm_"
    layers = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    for layer, value in layers.items():
        if value < VANISHING_SHARE * max(layers.values()):
            symptoms[f"vanishing {layer}"] = (
                f"the gradient vanishes in {layer}: its norm there is {value:.1e}, elsewhere {max(layers.values()):.1e}. Lower "
                "network.slope, raise network.init_gain, or take fewer layers"
            )
    return symptoms
