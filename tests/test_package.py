"""What a user meets who imports the package and looks around."""

import importlib.resources
import inspect
import pydoc
import subprocess
import sys

import pytest

import sast_jax
from sast_jax import sharpness


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_names_and_modules_are_there_before_any_was_used():
    code = """
import sys, sast_jax
print({"sam", "lif", "fit_nothing", "training", "theory", "__version__"} - set(dir(sast_jax)), "jax" in sys.modules)
print(sast_jax.theory.neuron.state_bound.__name__, sast_jax.training.make_train_step.__name__)
import sast_jax.sharpness
print(sast_jax.sam.__name__, type(sast_jax).__name__)
"""
    assert in_a_new_process(code) == ["{'fit_nothing'}", "False", "state_bound", "make_train_step", "sam", "module"]


def test_sam_is_the_function_and_its_module_has_another_name():
    assert sast_jax.sam is sharpness.sam
    assert inspect.ismodule(sast_jax.sharpness)


def test_every_listed_name_can_be_had_and_others_are_refused():
    assert all(getattr(sast_jax, name) is not None for name in dir(sast_jax) if not name.startswith("__"))
    assert set(sast_jax.__all__) <= set(dir(sast_jax))
    with pytest.raises(AttributeError, match="module 'sast_jax' has no attribute 'Sam'"):
        _ = sast_jax.Sam


def test_help_shows_the_functions_with_their_arguments():
    text = pydoc.plain(pydoc.render_doc(sast_jax))
    for name in ("sam", "lif", "spike_fn", "accumulate", "load_run"):
        assert f"    {name}(" in text


def test_functions_are_found_where_they_are_written():
    for name in sast_jax.__all__:
        value = getattr(sast_jax, name)
        if inspect.isfunction(value):
            assert getattr(sys.modules[value.__module__], name) is value
            assert inspect.getsource(value).startswith(f"def {name}(")


def test_types_are_marked_as_there_for_checkers():
    assert (importlib.resources.files("sast_jax") / "py.typed").is_file()


@pytest.mark.slow
def test_type_checker_sees_the_types_of_public_names(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import sast_jax\nfrom sast_jax import sam\n"
        "reveal_type(sam)\nreveal_type(sast_jax.SpikingMLP)\nreveal_type(sast_jax.training.make_train_step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "mypy"), str(tmp_path / "user.py")],
        capture_output=True,
        text=True,
    )
    seen = [line for line in done.stdout.splitlines() if "user.py" in line]
    assert len(seen) == 3, done.stdout
    assert "def (rho: float | jax" in seen[0]
    assert "num_classes: int" in seen[1]
    assert "TrainState" in seen[2]
