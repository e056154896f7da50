import os
import subprocess
import sys

import pytest

from sast_jax.compilation import keep_compiled

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "SAST_JAX_CACHE")


@pytest.fixture
def clean(monkeypatch):
    """The environment without what says where compiled programs are kept; restored afterwards."""
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in VARIABLES})
    return os.environ


PROGRAM = """
import os
from pathlib import Path
from sast_jax.compilation import keep_compiled
print(keep_compiled())
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))


def compute():
    jax.clear_caches()
    events.clear()
    print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x.T))(jnp.ones((20, 20))).sum()))
    print("/jax/compilation_cache/cache_hits" in events)


compute()
"""

DAMAGE = """
folder = Path(os.environ["SAST_JAX_CACHE"]) / "compiled"
entries = list(folder.glob("*-cache"))
assert entries
for entry in entries:
    entry.write_bytes(entry.read_bytes()[:50])  # As of a process that was killed, or a disk that was full.
compute()
for entry in folder.iterdir():
    entry.unlink()
for entry in entries:
    entry.mkdir()  # Neither to be read nor to be written.
compute()
"""


def run(code, environment):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split()


def test_second_process_loads_what_the_first_compiled_unless_damaged(clean, tmp_path):
    environment = {**clean, "SAST_JAX_CACHE": str(tmp_path)}
    first, second = run(PROGRAM, environment), run(PROGRAM + DAMAGE, environment)
    number = first[1]
    assert first == ["True", number, "False"]
    assert second[:3] == ["True", number, "True"]
    assert second[3:5] == [number, "False"]  # Damaged.
    assert second[5] == number  # Unwritable.


@pytest.mark.parametrize("name", VARIABLES[:2])
def test_what_the_environment_says_about_the_cache_stays(clean, tmp_path, name):
    clean |= {"SAST_JAX_CACHE": str(tmp_path / "cache"), name: ""}
    before = dict(clean)
    assert not keep_compiled()
    assert clean == before
    assert not (tmp_path / "cache").exists()


def test_folder_that_cannot_be_made_is_no_obstacle(clean, tmp_path):
    (tmp_path / "file").touch()
    clean["SAST_JAX_CACHE"] = str(tmp_path / "file" / "cache")
    assert not keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in clean
