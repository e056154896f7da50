"""Folders of recordings as they are found in the world: side files, wrong places, names of other encodings, changes."""

import os
import shutil

import numpy as np
import pytest

from sast_jax import cli, data
from sast_jax.data import decoders, recorded
from sast_jax.errors import UserError
from tests.conftest import gesture_events, write_aedat, write_nmnist_file

SIDE_FILES = (".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/._00001.bin", "__MACOSX/0.npy", ".hidden.bin", "._0.npy")


def load(root, **more):
    return data.load_dataset("nmnist", root=str(root), num_time_steps=3, num_validation=0, **more)


def load_gestures(root, **more):
    return data.load_dataset("dvs_gesture", root=str(root), num_time_steps=2, num_validation=0, downsample=8, **more)


def scatter_side_files(root):
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in SIDE_FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\0\x05\x16\x07 of the system")
    for file in list(root.rglob("*.*")):
        if not file.name.startswith("."):
            file.with_name(f"._{file.name}").write_bytes(b"\0\x05\x16\x07")


@pytest.mark.parametrize("kind", ["nmnist", "arrays", "aedat"])
def test_files_of_the_operating_system_are_no_recordings(kind, request):
    root = request.getfixturevalue({"nmnist": "small_nmnist", "arrays": "small_gestures", "aedat": "small_aedat"}[kind])
    root, read = root[0] if kind == "aedat" else root, load if kind == "nmnist" else load_gestures
    before = read(root)
    described = recorded.describe_recordings("nmnist" if kind == "nmnist" else "dvs_gesture", root)
    scatter_side_files(root)
    assert read(root).describe() == before.describe()
    assert read(root).notes == before.notes
    assert recorded.describe_recordings("nmnist" if kind == "nmnist" else "dvs_gesture", root) == described


def test_recordings_in_wrong_places_are_named_and_can_be_skipped(small_nmnist):
    file = small_nmnist / "Train/3/00001.bin"
    wrong = ["Train/10/a.bin", "Train/3/b.BIN", "Train/3/more/c.bin", "Train/d.bin", "Test/three/e.bin", "Test/²/f.bin"]
    for name in wrong:
        (small_nmnist / name).parent.mkdir(exist_ok=True)
        shutil.copy(file, small_nmnist / name)
    (small_nmnist / "Train/notes").mkdir()
    (small_nmnist / "Train/notes/README.txt").write_text("of the user's")
    with pytest.raises(UserError, match="6 problems with the files of") as error:
        load(small_nmnist)
    for name in wrong:
        line = f"{small_nmnist / name}: is no Train/<digit>/<name>.bin or Test/<digit>/<name>.bin, digit 0 to 9"
        assert line in str(error.value)
    splits = load(small_nmnist, skip_bad=True)
    assert (splits.num_skipped, len(splits.train.labels), len(splits.test.labels)) == (6, 40, 20)


def test_gestures_in_wrong_places_are_named(small_gestures, small_aedat):
    file = small_gestures / "ibmGestureTrain/user01_led/3.npy"
    for name in ("ibmGestureTrain/3.npy", "ibmGestureTrain/someone/3.npy", "ibmGestureTest/user24_led/4.NPY"):
        (small_gestures / name).parent.mkdir(exist_ok=True)
        shutil.copy(file, small_gestures / name)
        with pytest.raises(UserError, match=r"1 problem.*\n.*is no userNN_<light>/<class>.npy in ibmGestureTrain or ibmGestureT"):
            load_gestures(small_gestures)
        (small_gestures / name).unlink()
    for name in ("person3.aedat", "user03_led.AEDAT"):
        write_aedat(small_aedat[0] / name, [gesture_events(0)])
        with pytest.raises(UserError, match=f"1 problem.*\n.*{name}: is no userNN_<light>.aedat"):
            load_gestures(small_aedat[0])
        (small_aedat[0] / name).unlink()


@pytest.mark.parametrize("place", ["Train", "Train/3", "Test/0"])
def test_folder_that_may_not_be_read_is_named(small_nmnist, monkeypatch, place):
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path) == os.fspath(small_nmnist / place):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # Root, who runs tests in some places, may read everything.
    with pytest.raises(UserError, match=rf"^dataset.root: {small_nmnist / place}: cannot be read \(Permission denied\)$"):
        load(small_nmnist, skip_bad=True)


def test_link_to_nowhere_is_named(small_nmnist):
    (small_nmnist / "Train/3/00009.bin").symlink_to(small_nmnist / "gone")
    with pytest.raises(UserError, match=r"^dataset.root: .*Train/3/00009.bin: cannot be read \(No such file or directory\)$"):
        load(small_nmnist)


def test_recording_changed_at_equal_size_and_time_is_read_anew(small_nmnist):
    file = small_nmnist / "Train/3/00001.bin"
    before, status = load(small_nmnist), file.stat()
    events = decoders.read_nmnist_file(file).tolist()
    write_nmnist_file(file, [(33 - x, y, t, p) for x, y, t, p in events])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after, at = load(small_nmnist), list(before.train.ids).index("Train/3/00001")
    np.testing.assert_array_equal(after.train.frames[at], before.train.frames[at][:, :, ::-1])


@pytest.mark.parametrize("name", [b"caf\xe9", b"\x1b[2Jred\n", "文字é".encode()], ids=["Latin-1", "control", "UTF-8"])
def test_recordings_and_folders_of_any_name_are_read_and_shown_safely(small_nmnist, tmp_path, name, capsys):
    if os.name == "nt":
        pytest.skip("names are text there")
    root = tmp_path / os.fsdecode(name)
    small_nmnist.rename(root)
    (root / "Test/3/00001.bin").rename(root / "Test/3" / os.fsdecode(name + b".bin"))
    (root / "Train/3/00001.bin").rename(root / "Train/3" / os.fsdecode(b"bad" + name + b".bin"))
    (root / "Train/3" / os.fsdecode(b"bad" + name + b".bin")).write_bytes(b"123")
    flags = ["--config=configs/nmnist.py", f"--config.dataset.root={root}", "--config.dataset.num_time_steps=3"]
    flags += ["--config.dataset.num_validation=0", f"--workdir={tmp_path / 'out'}"]
    assert cli.main(["data", "info", *flags]) == 2
    out, err = capsys.readouterr()
    assert "size must be a positive multiple of 5 bytes; got 3" in err
    assert cli.main(["data", "info", *flags, "--config.dataset.skip_bad=true"]) == 0
    out = capsys.readouterr().out
    for text in (out, err):
        assert all(character.isprintable() or character == "\n" for character in text)
    shown = {b"caf\xe9": r"caf\xe9", b"\x1b[2Jred\n": r"\x1b[2Jred\n"}.get(name, "文字é")
    assert shown in out
    splits = load(root, skip_bad=True, corruption=("drop", 1))  # Seeded by each recording's id.
    assert f"Test/3/{name.decode(errors='backslashreplace')}" in splits.test.ids
    splits.test.ids.tobytes().decode("utf-32").encode()  # Text, which any file can hold.
    assert load(root, skip_bad=True).test.checksum() == load(root, skip_bad=True).test.checksum()


def test_label_file_with_a_byte_order_mark_is_read(small_aedat):
    folder, _ = small_aedat
    before = load_gestures(folder)
    for file in folder.glob("*_labels.csv"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_gestures(folder).describe() == before.describe()
    assert len(before.train.labels) == 3


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    from sast_jax.files import read_json

    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "a.json") == {"a": "é"}
