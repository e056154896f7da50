"""Sharpness-Aware Surrogate Training of spiking neural networks."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sast_jax import data, evaluation, experiments, report, theory, training
    from sast_jax.accumulation import accumulate
    from sast_jax.networks import Calibration, NetworkOutput, SpikingConvNet, SpikingMLP
    from sast_jax.neurons import LIFState, leaky_readout, lif, lif_init, lif_step, rate_readout
    from sast_jax.sharpness import SamState, sam
    from sast_jax.spikes import FAMILIES, SurrogateFamily, spike_fn
    from sast_jax.training import Run, load_run, train_and_evaluate

__version__ = "0.1.0"

__all__ = [
    "FAMILIES",
    "Calibration",
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


def __getattr__(name: str) -> Any:
    """Loads a name at its first use, so that the command line answers at once, and to Ctrl-C."""
    if name in __all__:
        value = getattr(importlib.import_module("sast_jax.public"), name)
    elif name in _modules():
        value = importlib.import_module(f"sast_jax.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_modules(), *(name for name in globals() if name.startswith("__"))})


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
