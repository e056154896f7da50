"""`python -m sast_jax`, the same as `sast-jax`."""

from sast_jax.cli import entry_point

if __name__ == "__main__":
    entry_point()
