"""The shape of the project: who may import whom, and what the texts promise."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import sast_jax

PACKAGE = Path("sast_jax")

LAYERS = [
    {"accumulation", "allocator", "errors", "files"},
    {"spikes", "sam", "data.events"},
    {"neurons", "data.cache", "data.simulated"},
    {"data.recorded", "data.batches", "networks"},
    {"data"},
    {"evaluation", "evaluation.transfer"},
    {"config"},
    {"training.build", "training.interruption", "training.progress", "training.state"},
    {"training.checkpoints"},
    {"training.run"},
    {"training.loop"},
    {"training"},
    {"cli"},
    {"__main__"},
]
"""A module imports from layers above its own. Only `sast_jax/__init__.py`, the public face, stands outside."""


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path):
    """Modules of the package that a file imports, at its top or within functions."""
    known = set().union(*LAYERS)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("sast_jax.") for alias in node.names if alias.name.startswith("sast_jax"))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sast_jax":
            base = node.module.removeprefix("sast_jax").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in known else base


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def test_every_module_has_a_layer():
    assert set().union(*LAYERS) == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_from_layers_above_its_own(name):
    layer = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    for other in imported_modules(MODULES[name]):
        assert layer[other] < layer[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", MODULES)
def test_config_dicts_stay_in_config_training_and_command_line(name):
    sees_one = "ml_collections" in MODULES[name].read_text()
    assert not sees_one or name.partition(".")[0] in ("config", "training", "cli")


def test_tonic_is_imported_only_where_recordings_are_read():
    importing = {name for name, path in MODULES.items() if re.search(r"^\s*(import|from) tonic", path.read_text(), re.M)}
    assert importing == {"data.recorded"}


def test_public_names_have_docstrings_and_are_all_there():
    for name in sast_jax.__all__:
        assert len(inspect.getdoc(getattr(sast_jax, name))) > 60, name


def test_changelog_knows_the_version():
    assert re.search(rf"^## {re.escape(sast_jax.__version__)}\b", Path("CHANGELOG.md").read_text(), re.M)


@pytest.mark.parametrize("name", re.findall(r"^<!-- begin (\w+) -->$", Path("README.md").read_text(), re.M))
def test_readme_shows_the_table_that_its_command_wrote(name):
    table = (Path("benchmarks/results") / f"{name}.md").read_text()
    assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in Path("README.md").read_text()
