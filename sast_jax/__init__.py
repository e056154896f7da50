"""Sharpness-Aware Surrogate Training of spiking neural networks."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sast_jax.public import *

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


class _LazyPackage(types.ModuleType):
    """Loads its names at their first use, so that the command line answers at once, and to Ctrl-C."""

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            return getattr(importlib.import_module("sast_jax.public"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Python makes a loaded submodule an attribute; `sast_jax.sam` shall be the function, not the module of that name.
        if name != "sam":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _LazyPackage
