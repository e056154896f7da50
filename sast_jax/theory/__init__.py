"""Bounds of the method's theory as numbers for a given network, and checks against what is measured.

`neuron` is about one neuron, `network` about layers and whole networks, `training` about curvature, SAM and convergence,
`certified` about training that keeps layers contracting. Statements and proofs: `docs/theory.md`.
"""

from sast_jax.theory.certified import cap_currents, keep_projected
from sast_jax.theory.network import (
    Certificate,
    LayerBounds,
    SmoothnessBounds,
    certify_agreement,
    layer_bounds,
    measured_gain,
    run_layers,
    smoothness_bounds,
)
from sast_jax.theory.neuron import contraction_factor, max_current, reachable_potentials, state_bound, time_gain
from sast_jax.theory.training import convergence_bound, hessian_extremes, mechanism_factor, sam_sandwich

__all__ = [
    "Certificate",
    "LayerBounds",
    "SmoothnessBounds",
    "cap_currents",
    "certify_agreement",
    "contraction_factor",
    "convergence_bound",
    "hessian_extremes",
    "keep_projected",
    "layer_bounds",
    "max_current",
    "measured_gain",
    "mechanism_factor",
    "reachable_potentials",
    "run_layers",
    "sam_sandwich",
    "smoothness_bounds",
    "state_bound",
    "time_gain",
]
