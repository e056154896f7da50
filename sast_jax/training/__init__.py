"""Training runs: state and step, the loop, and what they leave on disk."""

from sast_jax.errors import Interrupted
from sast_jax.training.loop import train_and_evaluate, train_many, train_variants
from sast_jax.training.run import Run, load_run
from sast_jax.training.session import read_metrics
from sast_jax.training.state import TrainState, init_state, make_train_step

__all__ = [
    "Interrupted",
    "Run",
    "TrainState",
    "init_state",
    "load_run",
    "make_train_step",
    "read_metrics",
    "train_and_evaluate",
    "train_many",
    "train_variants",
]
