"""What another person's files may not do: download, be run as programs, write to the terminal."""

import json
import os
import shutil

import pytest

from sast_jax import cli
from sast_jax.compilation import keep_compiled
from sast_jax.config import load_configs
from sast_jax.data import recorded
from sast_jax.errors import SuspicionWarning, UserError, show_warning
from sast_jax.text import align, printable, printable_lines
from sast_jax.training import train_and_evaluate
from tests.conftest import TINY, write_small_nmnist


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, which tests do not change, and its recordings."""
    folder = tmp_path_factory.mktemp("trust")
    root = write_small_nmnist(folder / "data")
    overrides = [*TINY, f"dataset.root={root}", "num_epochs=1", "checkpoint_every_epochs=1"]
    train_and_evaluate(load_configs("configs/nmnist.py:baseline", overrides)[""], folder / "run")
    return folder / "run", root


@pytest.fixture
def foreign(trained, tmp_path):
    """A copy of the run that asks for a download into a folder of its choice."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    content["config"]["dataset"] |= {"download": True, "root": str(tmp_path / "victim")}
    (run / "run.json").write_text(json.dumps(content))
    return run


@pytest.fixture
def downloads(monkeypatch):
    """The folders that would have been downloaded into; nothing is."""
    folders = []
    monkeypatch.setattr(recorded, "_download", lambda collection, base: folders.append(str(base)))
    return folders


@pytest.mark.parametrize("command", [["evaluate"], ["theory"], ["report"], ["train", "--config="]])
def test_file_of_a_run_alone_downloads_nothing(foreign, downloads, tmp_path, command, capsys):
    command = [each + str(foreign / "run.json") if each.endswith("=") else each for each in command]
    workdir = tmp_path / "new" if command[0] == "train" else foreign
    status = cli.main([*command, f"--workdir={workdir}"])
    assert downloads == []
    assert not (tmp_path / "victim").exists()
    if command[0] == "report":  # Which shows the rest, and says why there is no recording.
        assert status == 0
        said = (foreign / "report.html").read_text()
    else:
        assert status == 2
        said = capsys.readouterr().err
    assert "--config.dataset.download=true" in said


def test_flag_of_the_command_itself_downloads_to_the_root_it_names(foreign, downloads, tmp_path):
    flags = ["--config.dataset.download=true", f"--config.dataset.root={tmp_path / 'own'}"]
    assert cli.main(["evaluate", f"--workdir={foreign}", *flags]) == 2  # As nothing came.
    assert set(downloads) == {str(tmp_path / "own")}


def test_config_file_of_the_users_own_may_ask_for_a_download(tmp_path, downloads):
    overrides = [f"dataset.root={tmp_path / 'own'}", "dataset.download=true"]
    config = load_configs("configs/nmnist.py:baseline", overrides)[""]
    assert config.dataset.download is True
    with pytest.raises(UserError, match="does not exist"):
        recorded.find_recordings("nmnist", config.dataset.root, download=config.dataset.download)
    assert downloads == [str(tmp_path / "own")]


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """The environment with a cache of the test's own and nothing said about jax's."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    monkeypatch.setattr(os, "environ", environment | {"SAST_JAX_CACHE": str(tmp_path / "cache")})
    return os.environ


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as on Unix")
@pytest.mark.parametrize("mode", [None, 0o755, 0o777, 0o700])
def test_folder_of_compiled_programs_is_private(clean, tmp_path, mode):
    folder = tmp_path / "cache" / "compiled"
    if mode is not None:
        folder.mkdir(parents=True)
        folder.chmod(mode)
    before = os.umask(0)
    try:
        assert keep_compiled()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert clean["JAX_COMPILATION_CACHE_DIR"] == str(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users as on Unix")
def test_compiled_programs_of_another_user_are_not_used(clean, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert not keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in clean


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b1m\u202e\udcff"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\r\x9b1m\u202e\xff"


def test_control_characters_and_bytes_of_no_encoding_are_shown_as_escapes():
    assert printable(f"é 文 {HOSTILE}") == f"é 文 {SHOWN}"
    assert printable_lines(f"a\n{HOSTILE}") == f"a\n{SHOWN}"
    assert align([["run", "n"], [HOSTILE, "1"]]).splitlines()[1].startswith(SHOWN)


def test_errors_and_warnings_send_nothing_but_text_to_the_terminal(tmp_path, capsys, monkeypatch):
    assert cli.main(["evaluate", f"--workdir={tmp_path / HOSTILE.replace('/', '')}", "--suite=x\x1b[2J"]) == 2
    show_warning(f"--workdir: {HOSTILE}", SuspicionWarning, "", 0)
    monkeypatch.setitem(cli._COMMANDS, "report", lambda args, overrides: (_ for _ in ()).throw(OSError(5, "read", HOSTILE)))
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 2
    monkeypatch.setitem(cli._COMMANDS, "report", lambda args, overrides: (_ for _ in ()).throw(UserError(HOSTILE)))
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count(SHOWN) == 2
    assert all(character.isprintable() or character == "\n" for character in error)
