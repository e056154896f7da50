"""Studies: many runs that answer a question together."""

from sast_jax.experiments.study import METHODS, Method, Study, change

__all__ = ["METHODS", "Method", "Study", "change"]
