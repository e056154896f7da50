import functools
import http.server
import io
import json
import os
import shutil
import struct
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sast_jax import data, load_run
from sast_jax.config import load_configs
from sast_jax.data import decoders, recorded
from sast_jax.data.events import EVENT_DTYPE
from sast_jax.errors import UserError
from sast_jax.training import read_metrics, train_and_evaluate
from tests.conftest import gesture_events, write_aedat

GESTURES = {"num_time_steps": 4, "num_validation": 0, "downsample": 4}


def load(root, **more):
    return data.load_dataset("dvs_gesture", root=str(root), **{**GESTURES, **more})


def frames_by_hand(events, num_time_steps, duration, downsample):
    frames = np.zeros((num_time_steps, 128 // downsample, 128 // downsample, 2), int)
    for x, y, t, p in events:
        if t < duration:
            frames[t * num_time_steps // duration, y // downsample, x // downsample, p] += 1
    return frames


def test_array_is_read_as_written_with_times_from_its_first_event(tmp_path):
    np.save(tmp_path / "3.npy", np.array([[5, 7, 1, 2.5], [127, 0, 0, 2.501], [0, 127, 1, 900.0]], np.float32))
    assert decoders.read_gesture_array(tmp_path / "3.npy").tolist() == [(5, 7, 0, 1), (127, 0, 1, 0), (0, 127, 897_500, 1)]


def test_aedat_is_read_as_it_was_written_on_a_clock_that_overflowed(tmp_path):
    packets = [gesture_events(0), [], gesture_events(1, start=2**31 + 5, num_events=7), gesture_events(2, start=2**33)]
    write_aedat(tmp_path / "a.aedat", packets)
    assert decoders.read_aedat(tmp_path / "a.aedat").tolist() == [event for packet in packets for event in packet]


def test_aedat_agrees_with_the_words_that_tonic_decodes(tmp_path):
    from tonic.io import get_aer_events_from_file, read_aedat_header_from_file

    write_aedat(tmp_path / "a.aedat", [gesture_events(0), gesture_events(1)])
    version, start, _ = read_aedat_header_from_file(str(tmp_path / "a.aedat"))
    words = get_aer_events_from_file(str(tmp_path / "a.aedat"), version, start)
    events = decoders.read_aedat(tmp_path / "a.aedat")
    address = words["address"]
    np.testing.assert_array_equal(events["x"], address >> 17 & 0x1FFF)
    np.testing.assert_array_equal(events["y"], address >> 2 & 0x1FFF)
    np.testing.assert_array_equal(events["p"], address >> 1 & 1)
    np.testing.assert_array_equal(events["t"], words["timeStamp"])


def test_other_packets_and_invalid_events_of_an_aedat_file_are_left_out(tmp_path):
    write_aedat(tmp_path / "a.aedat", [[(1, 2, 3, 1), (4, 5, 6, 0)]])
    raw = (tmp_path / "a.aedat").read_bytes()
    special = struct.pack("<hhiiiiii", 0, 0, 8, 4, 0, 1, 1, 1) + struct.pack("<Ii", 1, 4)
    with_room = struct.pack("<hhiiiiii", 1, 0, 8, 4, 0, 3, 1, 1) + struct.pack("<Ii", 7 << 17 | 1, 9) + bytes(16)
    invalid = struct.pack("<hhiiiiii", 1, 0, 8, 4, 0, 1, 1, 0) + struct.pack("<Ii", 7 << 17, 9)
    (tmp_path / "a.aedat").write_bytes(raw + special + with_room + invalid)
    assert decoders.read_aedat(tmp_path / "a.aedat").tolist() == [(1, 2, 3, 1), (4, 5, 6, 0), (7, 0, 9, 0)]


def test_tonics_layout_is_binned_split_by_user_and_sorted(small_gestures):
    splits = load(small_gestures, duration=0.6, binary=False)
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [22, 0, 22]
    assert splits.num_classes == 11
    assert splits.train.ids.tolist() == sorted(f"ibmGestureTrain/user{user}_led/{k}" for user in ("01", "07") for k in range(11))
    assert all(name.endswith(f"/{label}") for name, label in zip(splits.test.ids, splits.test.labels, strict=True))
    for i in (0, 13):
        user, label = int(splits.test.ids[i][19:21]), splits.test.labels[i]
        expected = frames_by_hand(gesture_events(100 * user + label), 4, 600_000, 4)
        np.testing.assert_array_equal(splits.test.frames[i], expected)
        assert 0 < expected.sum() < 300
    assert not splits.notes


def test_original_layout_is_cut_by_its_labels_and_split_by_user(small_aedat):
    folder, expected = small_aedat
    splits = load(folder, downsample=1, duration=1.0, binary=False)
    assert splits.train.ids.tolist() == ["user02_natural/0", "user02_natural/7", "user02_natural/7-2"]
    assert splits.test.ids.tolist() == ["user25_natural/0", "user25_natural/7", "user25_natural/7-2"]
    assert splits.train.labels.tolist() == [0, 7, 7]
    for part in (splits.train, splits.test):
        for name, frames in zip(part.ids, part.frames, strict=True):
            np.testing.assert_array_equal(frames, frames_by_hand(expected[name], 4, 1_000_000, 1))


def test_whole_recording_is_cut_into_equal_steps_of_its_own_length(small_aedat):
    folder, expected = small_aedat
    splits = load(folder, duration=0.0, binary=False)
    for name, frames in zip(splits.train.ids, splits.train.frames, strict=True):
        length = expected[name][-1][2] + 1
        np.testing.assert_array_equal(frames, frames_by_hand(expected[name], 4, length, 4))
        assert frames.sum() == 300


def test_folder_may_be_the_one_around(small_aedat, tmp_path):
    folder = small_aedat[0].rename(tmp_path / "DvsGesture")
    assert recorded.find_recordings("dvs_gesture", str(tmp_path), download=False) == folder


def test_corruption_reaches_recordings_of_any_layout_and_length(small_aedat, small_gestures):
    for root in (small_aedat[0], small_gestures):
        clean, corrupted = (load(root, binary=False, corruption=each) for each in (None, ("drop", 5)))
        assert clean.train.checksum() == corrupted.train.checksum()
        lost = 1 - corrupted.test.frames.sum(dtype=int) / clean.test.frames.sum(dtype=int)
        assert lost == pytest.approx(0.8, abs=0.06)


def test_validation_part_is_made_of_persons_of_its_own(small_gestures):
    splits = load(small_gestures, num_validation=3, seed=1)
    users = [{name.split("/")[1] for name in part.ids} for part in (splits.train, splits.validation)]
    assert sorted(map(len, users)) == [1, 1]
    assert users[0].isdisjoint(users[1])
    assert len(splits.validation.labels) == 11
    with pytest.raises(UserError, match=r"num_validation: 12 samples take all 2 persons"):
        load(small_gestures, num_validation=12)


def test_users_beside_the_official_split_go_where_their_folder_says(small_gestures):
    shutil.move(small_gestures / "ibmGestureTest" / "user24_led", small_gestures / "ibmGestureTrain" / "user24_led")
    shutil.move(small_gestures / "ibmGestureTest" / "user29_led", small_gestures / "ibmGestureTest" / "user31_led")
    shutil.move(small_gestures / "ibmGestureTrain" / "user01_led", small_gestures / "ibmGestureTrain" / "user00_dark")
    splits = load(small_gestures)
    users = [{name.split("/")[1] for name in part.ids} for part in (splits.train, splits.test)]
    assert users == [{"user00_dark", "user07_led"}, {"user24_led", "user31_led"}]


def test_set_without_test_users_says_so_and_can_be_split(small_gestures):
    shutil.rmtree(small_gestures / "ibmGestureTest")
    with pytest.raises(UserError, match=r"no recordings of the test part; .*--config.dataset.num_test=N"):
        load(small_gestures)
    assert len(load(small_gestures, num_test=11).test.labels) == 11


def test_set_with_test_users_is_not_split_again(small_gestures):
    with pytest.raises(UserError, match=r"brings its own test part, so it must be 0; got 5"):
        load(small_gestures, num_test=5)


def test_class_without_recordings_is_noted(small_gestures):
    for user in ("01", "07"):
        (small_gestures / "ibmGestureTrain" / f"user{user}_led" / "10.npy").unlink()
    (note,) = load(small_gestures).notes
    assert f"the train part of {str(small_gestures)!r} has no recording of class 10 (other gestures)" in note


BAD_GESTURES = {
    "empty.npy": (b"", "is no readable .npy file"),
    "1.npy": (b"not an array", "is no readable .npy file"),
    "2.npy": (np.zeros((0, 4), np.float32), "holds no events"),
    "3.npy": (np.zeros((5, 3), np.float32), r"must be an array [N, 4] of numbers (x, y, p, t); got [5, 3] of float32"),
    "4.npy": (np.array([[1, 1, 1, 5], [1, 1, 1, 4]], np.float32), "event times must not decrease"),
    "5.npy": (np.array([[1, 1, 1, -5], [1, 1, 1, 4]], np.float32), "event times must be 0 or more; got -5000 us"),
    "6.npy": (np.array([[1, 1, 2, 5]], np.float32), "event p must be 0 to 1; got 2 to 2"),
    "7.npy": (np.array([[1, -1, 0, 5]], np.float32), "event y must be 0 to 127; got -1 to -1"),
    "8.npy": (np.array([[1, 200, 0, 5]], np.float32), "x, y and p must be integers from 0 to 127"),
    "9.npy": (np.array([[1, np.nan, 0, 5]], np.float32), "must be finite numbers"),
    "10.npy": (np.array([[{}, 1, 0, 5]], object), "is no readable .npy file"),
}


def spoil(folder):
    for name, (content, _) in BAD_GESTURES.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            np.save(folder / name, content, allow_pickle=True)


def test_every_bad_array_is_named_and_can_be_skipped(small_gestures):
    folder = small_gestures / "ibmGestureTrain" / "user01_led"
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(small_gestures)
    assert str(error.value).startswith(f"dataset.root: 11 problems with the files of {str(small_gestures)!r}")
    splits = load(small_gestures, skip_bad=True)
    assert splits.num_skipped == splits.describe()["num_skipped"] == 11
    assert [len(part.labels) for part in (splits.train, splits.test)] == [22 - 10, 22]
    text = "\n".join(splits.notes)
    assert "... and 1 more" in text
    named = [f"{folder / name}: {reason}" for name, (_, reason) in BAD_GESTURES.items() if name != "empty.npy"]
    assert sum(each in text for each in named) >= len(named) - 1
    assert f"{folder / 'empty.npy'}: the name must be the class, 0.npy to 10.npy" in text
    again = load(small_gestures, skip_bad=True)  # From the cache.
    assert again.notes == splits.notes
    assert again.test.checksum() == splits.test.checksum()
    with pytest.raises(UserError, match="11 problems"):
        load(small_gestures)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "user02_natural_labels.csv: is missing; without it the gestures in user02_natural.aedat are not known"),
        ("", "must begin with the heading class,startTime_usec,endTime_usec; got ''"),
        ("class,a,b\n1,2\n", "line 2 must be three integers; got '1,2'"),
        ("class,a,b\n1,5000000,6000000\n12,1,2\n", "line 3 must be a class from 1 to 11, a start and a later end"),
        ("class,a,b\n1,6,5\n", "line 2 must be a class from 1 to 11, a start and a later end"),
        ("class,a,b\n", "lists no gestures"),
        ("class,a,b\n1,1,2\n", "from 1 to 2 us: holds no events"),
    ],
)
def test_bad_labels_are_named(small_aedat, content, message):
    folder, _ = small_aedat
    labels = folder / "user02_natural_labels.csv"
    labels.unlink() if content is None else labels.write_text(content)
    with pytest.raises(UserError) as error:
        load(folder)
    assert message in str(error.value)
    assert "user02_natural" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-5], "where .* are left"),
        (lambda raw: raw + b"12345", "ends within the header of a packet"),
        (lambda raw: raw.replace(b"3.1", b"2.0"), "must begin with #!AER-DAT3.1"),
        (lambda raw: raw.replace(b"END-HEADER", b"end-header"), "has no end of its header"),
        (lambda raw: b"", "must begin with #!AER-DAT3.1; got b''"),
        (lambda raw: raw[:61] + struct.pack("<hhiiiiii", 1, 0, 8, 4, 0, 2**31 - 1, 1, 1), "a packet of 17179869176 bytes"),
        (lambda raw: raw[:61] + struct.pack("<hhiiiiii", 1, 0, 8, 4, 0, 1, 2, 1), "a packet of 2 of 1 events"),
        (lambda raw: raw[:61] + struct.pack("<hhiiiiii", 1, 0, 12, 4, 0, 0, 0, 0), "polarity events of 12 bytes"),
    ],
)
def test_damaged_aedat_file_is_named(small_aedat, change, message):
    file = small_aedat[0] / "user25_natural.aedat"
    raw = file.read_bytes()
    assert raw.index(b"END-HEADER\r\n") + 12 == 61
    file.write_bytes(change(raw))
    with pytest.raises(UserError, match=f"(?s){file.name}: .*{message}"):
        load(small_aedat[0])


def test_event_outside_the_sensor_is_refused_though_pixels_are_joined(small_aedat):
    write_aedat(small_aedat[0] / "user25_natural.aedat", [[(128, 3, 5_000_001, 0)]])
    with pytest.raises(UserError, match=r"event x must be 0 to 127; got 128 to 128"):
        load(small_aedat[0])


def test_file_that_cannot_be_opened_is_no_bad_recording(small_gestures):
    file = small_gestures / "ibmGestureTrain" / "user01_led" / "3.npy"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"3.npy: cannot be read \(Is a directory\)"):
        load(small_gestures, skip_bad=True)


def test_frames_beyond_the_memory_are_refused(small_gestures):
    with pytest.raises(UserError, match=r"dataset.num_time_steps: frames 44x100000000x128x128x2 need .* GB, this machine has"):
        load(small_gestures, num_time_steps=100_000_000, downsample=1)


def npy_header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_small_array_file_cannot_ask_for_much_memory(tmp_path):
    (tmp_path / "0.npy").write_bytes(npy_header((10**10, 4)) + bytes(40_000))
    with pytest.raises(ValueError, match=r"is no readable \.npy file"):
        decoders.read_gesture_array(tmp_path / "0.npy")


def test_rows_of_overflow_that_take_tonic_hours_are_refused_at_once(tmp_path):
    (tmp_path / "0.bin").write_bytes(bytes([1, 240, 0, 0, 1]) * 400_000)
    with pytest.raises(ValueError, match="event y must be 0 to 33; got 240"):
        decoders.read_nmnist_file(tmp_path / "0.bin")


def valid_files(folder):
    """A small valid file for each decoder."""
    write_aedat(folder / "a.aedat", [[(1, 2, 3, 1), (4, 5, 6, 0)], [(1, 2, 9, 1)]])
    np.save(folder / "0.npy", np.array([[1, 2, 0, 3.5], [4, 5, 1, 6.5]], np.float32))
    (folder / "a.csv").write_text("class,startTime_usec,endTime_usec\n1,0,10\n11,20,30\n")
    (folder / "0.bin").write_bytes(bytes([3, 4, 128, 0, 1, 5, 6, 0, 0, 2]))
    return {
        "a.aedat": decoders.read_aedat,
        "0.npy": decoders.read_gesture_array,
        "a.csv": decoders.read_gesture_labels,
        "0.bin": decoders.read_nmnist_file,
    }


def test_recording_that_ends_behind_its_header_is_refused(tmp_path):
    valid_files(tmp_path)
    file = tmp_path / "a.aedat"
    header, end, _ = file.read_bytes().partition(b"#!END-HEADER\r\n")
    assert end
    file.write_bytes(header + end)
    with pytest.raises(ValueError, match="holds no polarity events"):
        decoders.read_aedat(file)


@pytest.mark.filterwarnings("ignore")  # NumPy warns of odd headers that it can still read.
@pytest.mark.parametrize("name", ["a.aedat", "0.npy", "a.csv", "0.bin"])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    garbage=st.one_of(st.none(), st.binary(max_size=200)),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decoder_returns_events_or_a_value_error_whatever_the_file_holds(tmp_path, name, edits, garbage):
    decode = valid_files(tmp_path)[name]
    file = tmp_path / name
    assert len(decode(file)) >= 2
    raw = bytearray(file.read_bytes() if garbage is None else garbage)
    for share, kind, new in edits:
        at = int(share * len(raw))
        if kind == 0:
            raw[at : at + len(new)] = new
        elif kind == 1:
            del raw[at : at + len(new)]
        elif kind == 2:
            raw[at:at] = new
        else:
            del raw[at:]
    file.write_bytes(bytes(raw))
    try:
        result = decode(file)
    except ValueError:
        return
    assert 0 < len(result) <= len(raw)
    assert isinstance(result[0], decoders.Gesture) or result.dtype == EVENT_DTYPE


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers any request with `body`."""

    body = b""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def answer(monkeypatch):
    """A local server in place of tonic's links; returns the function that sets its answer."""
    import tonic

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/file"
        for part in ("train", "test"):
            monkeypatch.setattr(tonic.datasets.DVSGesture, f"{part}_url", f"{url}-{part}")
        yield functools.partial(monkeypatch.setattr, Answer, "body")
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the link is dead: it answered with 0 bytes instead of ibmGestureTrain.tar.gz"),
        (b"\n<!DOCTYPE html><html>Please wait</html>", "the link is dead: it answered with a web page instead of ibmGesture"),
        (b"\x1f\x8b" + b"x" * 100, "RuntimeError: File not found or corrupted"),
    ],
)
def test_dead_link_leaves_nothing_and_says_what_to_put_where(answer, tmp_path, body, message, capsys):
    answer(body)
    for base in (tmp_path / "new" / "data", tmp_path):
        with pytest.raises(UserError) as error:
            recorded.find_recordings("dvs_gesture", str(base), download=True)
        text = str(error.value)
        assert message in text
        assert "DvsGesture.tar.gz" in text
        assert f"Unpack it into {str(base / 'DVSGesture')!r}" in text
        assert f"--config.dataset.root={base}" in text
        assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_working_link_is_downloaded_checked_and_unpacked(answer, small_gestures, tmp_path, monkeypatch):
    import hashlib

    import tonic

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(small_gestures / "ibmGestureTrain", "ibmGestureTrain")
        tar.add(small_gestures / "ibmGestureTest", "ibmGestureTest")
    answer(archive.getvalue())
    for part in ("train", "test"):
        monkeypatch.setattr(tonic.datasets.DVSGesture, f"{part}_md5", hashlib.md5(archive.getvalue()).hexdigest())
    folder = recorded.find_recordings("dvs_gesture", str(tmp_path / "new"), download=True)
    assert sorted(path.name for path in folder.iterdir()) == ["ibmGestureTest", "ibmGestureTrain"]
    assert load(folder).test.checksum() == load(small_gestures).test.checksum()


def test_real_gestures_are_read_whole(gesture_root):
    splits = load(gesture_root, num_test=2, duration=1.45, downsample=2, num_time_steps=20, binary=False)
    assert splits.train.frames.shape == (8, 20, 64, 64, 2)
    recordings = [splits.train, splits.test]
    labels = np.concatenate([part.labels for part in recordings])
    assert sorted(labels) == list(range(10))
    for part in recordings:
        for name, frames in zip(part.ids, part.frames, strict=True):
            num_events = len(np.load(gesture_root / f"{name}.npy", mmap_mode="r"))
            assert 63_000 < num_events < 182_000
            assert 0.98 * num_events < frames.sum(dtype=int) <= num_events
            assert 0.3 < frames[..., 1].sum(dtype=int) / frames.sum(dtype=int) < 0.7
    assert "10 (other gestures)" in "\n".join(splits.notes)


def test_cached_frames_follow_duration_and_downsampling(small_gestures):
    shapes = {
        (downsample, duration): load(small_gestures, downsample=downsample, duration=duration, binary=False).test.frames
        for downsample in (2, 4)
        for duration in (0.0, 0.5)
    }
    assert {key: frames.shape[2] for key, frames in shapes.items()} == {(2, 0.0): 64, (2, 0.5): 64, (4, 0.0): 32, (4, 0.5): 32}
    assert shapes[2, 0.0].sum(dtype=int) > shapes[2, 0.5].sum(dtype=int)
    joined = shapes[2, 0.5].reshape(-1, 4, 32, 2, 32, 2, 2).sum((3, 5), dtype=int)
    np.testing.assert_array_equal(joined, shapes[4, 0.5])


def test_gestures_are_trained_on_and_the_run_says_what_was_skipped(small_gestures, tmp_path, caplog):
    (small_gestures / "ibmGestureTrain" / "user01_led" / "3.npy").write_bytes(b"")
    overrides = ["num_time_steps=3", "downsample=8", "num_validation=5", "skip_bad=true", f"root={small_gestures}"]
    network = ["network.kind=mlp", "network.features=8", "batch_size=5", "num_epochs=1"]
    config = load_configs("configs/dvs_gesture.py:small_baseline", [*(f"dataset.{each}" for each in overrides), *network])[""]
    results = train_and_evaluate(config, tmp_path / "run")
    assert results["num_test"] == 22
    assert results["num_train"] + results["num_validation"] == 21
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["num_skipped"] == 1
    assert "1 problem with the files of" in caplog.text
    assert "3.npy: is no readable .npy file" in caplog.text
    assert 0 <= read_metrics(tmp_path / "run")[0]["data_seconds"] <= read_metrics(tmp_path / "run")[0]["seconds"]
    assert load_run(tmp_path / "run").predict(np.zeros((3, 1, 16, 16, 2))).shape == (1, 11)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_named(small_gestures):
    (small_gestures / "ibmGestureTrain" / "user01_led" / "3.npy").chmod(0)
    with pytest.raises(UserError, match=r"3.npy: cannot be read \(Permission denied\)"):
        load(small_gestures, skip_bad=True)
