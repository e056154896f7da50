"""The shape of the project: its public face, and what its texts promise. `lint-imports` checks who imports whom."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sast_jax


def test_command_line_loads_nothing_heavy_before_it_is_used():
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


PAGES = {str(page): page.read_text() for page in (Path("README.md"), *sorted(Path("docs/results").glob("*.md")))}
TEXTS = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md")), *sorted(Path("docs").glob("*/*.md"))]


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page, text in PAGES.items() for name in re.findall(r"^<!-- begin (\w+) -->$", text, re.M)]
)
def test_page_shows_the_table_that_its_command_wrote(page, name):
    table = (Path("benchmarks/results") / f"{name}.md").read_text()
    assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in PAGES[page]


def anchors(page):
    """The anchors of a page's headings, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=str)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), (target, anchor)


def test_pages_have_short_sentences():
    done = subprocess.run([sys.executable, ".ci/prose"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_readme_is_short():
    text = Path("README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200
