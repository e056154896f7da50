"""The shape of the project: who may import whom, and what the texts promise."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sast_jax

PACKAGE = Path("sast_jax")

LAYERS = [
    {"accumulation", "allocator", "errors", "randomness", "text"},
    {"devices", "files"},
    {"compilation"},
    {"convolution", "spikes", "sam", "data.events"},
    {"neurons", "data.cache", "data.camera", "data.corruption", "data.decoders", "data.images"},
    {"pallas"},
    {
        "data.splits",
        "data.simulated",
        "data.gestures",
        "data.recorded",
        "data.batches",
        "data.checks",
        "networks",
        "theory.neuron",
        "theory.certified",
        "theory.training",
    },
    {"data.catalogue", "data.augmentation", "data.loading", "theory.network"},
    {"data", "nir_export", "theory"},
    {"evaluation", "evaluation.outputs", "evaluation.theory", "inspection"},
    {"evaluation.transfer", "evaluation.calibration", "evaluation.synops"},
    {"evaluation.quantization", "evaluation.robustness"},
    {"config"},
    {"training.health", "training.interruption", "training.progress", "training.state"},
    {"training.build", "training.checkpoints"},
    {"training.run"},
    {"training.session", "training.theory", "training.together"},
    {"training.loop"},
    {"training.processes"},
    {"training"},
    {"evaluation.suites", "report", "report.markup"},
    {"report.charts", "report.gather"},
    {"experiments.board", "experiments.statistics", "experiments.study", "report.parts"},
    {"experiments.comparison", "experiments.plan", "report.runs", "report.suites"},
    {"experiments.page"},
    {"experiments.sweep", "report.page"},
    {"experiments", "public"},
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
def test_config_dicts_stay_in_config_training_experiments_and_command_line(name):
    sees_one = "ml_collections" in MODULES[name].read_text()
    assert not sees_one or name.partition(".")[0] in ("config", "training", "experiments", "cli")


def test_tonic_is_imported_only_where_recordings_are_read():
    importing = {name for name, path in MODULES.items() if re.search(r"^\s*(import|from) tonic", path.read_text(), re.M)}
    assert importing == {"data.decoders", "data.recorded"}


def test_command_line_and_package_load_nothing_heavy_before_it_is_used():
    code = """
import sys, sast_jax, sast_jax.cli
print([name for name in ("jax", "flax", "optax", "orbax", "numpy") if name in sys.modules])
from sast_jax.config import load_configs
from sast_jax import sam, train_and_evaluate
heavy = ("orbax", "tonic", "sklearn", "scipy", "matplotlib")
print(sam.__name__, sast_jax.sam is sam, [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "sam True []"]


def test_public_face_holds_the_names_that_the_package_promises():
    from sast_jax import public

    assert {name for name in vars(public) if name[0] not in "_@"} == set(sast_jax.__all__)
    with pytest.raises(AttributeError, match="module 'sast_jax' has no attribute 'nothing'"):
        _ = sast_jax.nothing


def test_public_names_have_docstrings_and_are_all_there():
    for name in sast_jax.__all__:
        assert len(inspect.getdoc(getattr(sast_jax, name))) > 60, name


def test_changelog_knows_the_version():
    assert re.search(rf"^## {re.escape(sast_jax.__version__)}\b", Path("CHANGELOG.md").read_text(), re.M)


PAGES = {page: Path(page).read_text() for page in ("README.md", "docs/results.md")}


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page, text in PAGES.items() for name in re.findall(r"^<!-- begin (\w+) -->$", text, re.M)]
)
def test_page_shows_the_table_that_its_command_wrote(page, name):
    table = (Path("benchmarks/results") / f"{name}.md").read_text()
    assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in PAGES[page]


@pytest.mark.parametrize("page", ["README.md", *map(str, Path("docs").glob("*.md"))])
def test_links_lead_to_files_that_are_there(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", Path(page).read_text())
    assert [target for target in targets if not (Path(page).parent / target).exists()] == []
