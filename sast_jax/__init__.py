"""Sharpness-Aware Surrogate Training of spiking neural networks."""

from sast_jax.accumulation import accumulate
from sast_jax.networks import NetworkOutput, SpikingConvNet, SpikingMLP
from sast_jax.neurons import LIFState, leaky_readout, lif, lif_init, lif_step, rate_readout
from sast_jax.sam import SamState, sam
from sast_jax.spikes import FAMILIES, SurrogateFamily, spike_fn
from sast_jax.training import Run, load_run, train_and_evaluate

__version__ = "0.1.0"

__all__ = [
    "FAMILIES",
    "LIFState",
    "NetworkOutput",
    "Run",
    "SamState",
    "SpikingConvNet",
    "SpikingMLP",
    "SurrogateFamily",
    "accumulate",
    "leaky_readout",
    "lif",
    "lif_init",
    "lif_step",
    "load_run",
    "rate_readout",
    "sam",
    "spike_fn",
    "train_and_evaluate",
]
