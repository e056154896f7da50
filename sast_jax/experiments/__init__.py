"""Studies: many runs that answer a question together."""

from sast_jax.experiments.study import METHODS, Method, Study, change, with_grid

__all__ = ["METHODS", "Method", "Study", "change", "with_grid"]
