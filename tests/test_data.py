import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax import data
from sast_jax.data import (
    DESCENT,
    PERTURBATION,
    batch_indices,
    bin_events,
    cache,
    decoders,
    evaluation_batches,
    recorded,
    splits,
)
from sast_jax.data.events import EVENT_DTYPE
from sast_jax.errors import UserError
from tests.conftest import write_nmnist_file


@given(seed=st.integers(0, 2**32 - 1), num_events=st.integers(0, 300), num_time_steps=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
@pytest.mark.filterwarnings("ignore:bin_events")  # Of a few events, all may lie behind the end.
def test_binning_agrees_with_counting_one_event_at_a_time(seed, num_events, num_time_steps):
    rng = np.random.default_rng(seed)
    events = np.zeros(num_events, EVENT_DTYPE)
    events["x"], events["y"] = rng.integers(0, 5, num_events), rng.integers(0, 4, num_events)
    events["p"], events["t"] = rng.integers(0, 2, num_events), rng.integers(0, 1200, num_events)
    expected = np.zeros((num_time_steps, 4, 5, 2), int)
    for x, y, t, p in events.tolist():
        for step in range(num_time_steps):
            if step * 1000 <= t * num_time_steps < (step + 1) * 1000:
                expected[step, y, x, p] += 1
    frames = bin_events(events, sensor_size=(4, 5), num_time_steps=num_time_steps, duration=1000)
    np.testing.assert_array_equal(frames, expected)


def test_more_than_255_events_saturate():
    events = np.zeros(300, EVENT_DTYPE)
    frames = bin_events(events, sensor_size=(1, 1), num_time_steps=1, duration=10)
    assert frames.tolist() == [[[[255, 0]]]]
    assert frames.dtype == np.uint8


@pytest.mark.parametrize("event", [(5, 0, 0, 0), (0, 4, 0, 0), (-1, 0, 0, 0), (0, 0, -1, 0), (0, 0, 0, 2)])
def test_impossible_event_is_refused(event):
    with pytest.raises(ValueError, match=r"event [xypt] must be 0"):
        bin_events(np.array([event], EVENT_DTYPE), sensor_size=(4, 5), num_time_steps=2, duration=10)


@given(seed=st.integers(0, 1000), num_second=st.integers(0, 59))
@settings(max_examples=30, deadline=None)
def test_split_is_disjoint_complete_and_in_proportion(seed, num_second):
    labels = np.repeat([0, 1, 2], [30, 20, 10])
    first, second = splits.split(np.arange(60), labels, num_second, seed=seed)
    assert sorted([*first, *second]) == list(range(60))
    assert len(second) == num_second
    np.testing.assert_allclose(np.bincount(labels[second], minlength=3), np.array([0.5, 1 / 3, 1 / 6]) * num_second, atol=1.01)


def test_split_follows_its_seed_and_refuses_an_empty_first_part():
    labels = np.zeros(40, int)
    again = [splits.split(np.arange(40), labels, 10, seed=seed)[1].tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    with pytest.raises(UserError, match=r"dataset.num_test: must be 0 to 39.*got 40"):
        splits.split(np.arange(40), labels, 40, seed=0, what="num_test")


def test_digits_come_in_disjoint_parts_of_the_stated_sizes():
    splits = data.load_dataset("digits", num_time_steps=10, num_validation=180, num_test=360)
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [1257, 180, 360]
    ids = np.concatenate([splits.train.ids, splits.validation.ids, splits.test.ids])
    assert len(np.unique(ids)) == 1797
    assert splits.train.frames.shape[1:] == (10, 34, 34, 2)
    assert splits.train.frames.max() == 1
    assert min(np.bincount(splits.test.labels)) >= 34
    counts = data.load_dataset("digits", num_time_steps=10, num_validation=180, num_test=360, binary=False)
    assert counts.train.frames.max() > 1
    np.testing.assert_array_equal(np.minimum(counts.test.frames, 1), splits.test.frames)


def test_recording_is_read_as_it_was_written(tmp_path):
    events = [(3, 7, 5, 1), (33, 0, 70_000, 0), (0, 33, 300_001, 1)]
    write_nmnist_file(tmp_path / "a.bin", events)
    assert decoders.read_nmnist_file(tmp_path / "a.bin").tolist() == events


def read_nmnist(folder, **more):
    entry = data.CATALOGUE["nmnist"]
    return recorded.read_recordings("nmnist", folder, sensor_size=entry.sensor_size, duration=entry.duration, **more)


def test_folder_is_read_whole_with_labels_and_ids(small_nmnist):
    recordings = read_nmnist(small_nmnist, num_time_steps=5)
    assert recordings.frames.shape == (60, 5, 34, 34, 2)
    assert recordings.ids[0] == "Test/0/00000"
    assert all(int(name.split("/")[1]) == label for name, label in zip(recordings.ids, recordings.labels, strict=True))
    assert (recordings.frames.sum((1, 2, 3, 4)) == 400).all()


def test_own_test_part_stays_the_test_part(small_nmnist):
    splits = data.load_dataset("nmnist", root=str(small_nmnist), num_time_steps=5, num_validation=10)
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [30, 10, 20]
    assert all(name.startswith("Test/") for name in splits.test.ids)
    assert all(name.startswith("Train/") for name in [*splits.train.ids, *splits.validation.ids])


def test_folds_test_all_recordings_once_but_those_of_validation(small_nmnist):
    load = functools.partial(data.load_dataset, "nmnist", root=str(small_nmnist), num_time_steps=3, num_validation=10)
    folds, own = [load(fold=(number, 5)) for number in range(5)], load()
    everything = {*own.train.ids, *own.test.ids}
    for fold in folds:
        assert list(fold.validation.ids) == list(own.validation.ids)
        assert {*fold.train.ids, *fold.test.ids} == everything
        assert np.bincount(fold.test.labels).tolist() == [1] * 10  # Of 5 of each digit.
    tested = np.concatenate([fold.test.ids for fold in folds])
    assert sorted(tested) == sorted(everything)
    assert len({fold.describe()["checksum"] for fold in folds}) == 5


def test_folds_keep_groups_together_and_differ_in_size_by_one():
    labels, groups = np.arange(46) % 4, np.arange(46) // 2
    for by, unit in ((None, 1), (groups, 2)):
        parts = [splits.take_fold(np.arange(46), labels, number=k, num_folds=6, seed=1, groups=by) for k in range(6)]
        assert np.array_equal(np.sort(np.concatenate([fold for _, fold in parts])), np.arange(46))
        sizes = [len(fold) for _, fold in parts]
        assert max(sizes) - min(sizes) <= unit
        for others, fold in parts:
            assert np.array_equal(np.sort(np.concatenate([others, fold])), np.arange(46))
            if by is not None:
                assert not set(by[others]) & set(by[fold])
    with pytest.raises(UserError, match=r"dataset.fold: 3 persons cannot make 4 folds"):
        splits.take_fold(np.arange(6), labels, number=0, num_folds=4, seed=0, groups=groups)


def test_every_damaged_file_is_named_at_once(small_nmnist):
    (small_nmnist / "Train/3/00001.bin").write_bytes(b"1234567")
    (small_nmnist / "Test/4/00000.bin").write_bytes(b"")
    (small_nmnist / "Train/5/00002.bin").write_bytes(b"this is a text, not a recording" + b"." * 4)
    write_nmnist_file(small_nmnist / "Train/6/00000.bin", [(40, 1, 10, 0)])
    write_nmnist_file(small_nmnist / "Train/7/00000.bin", [(1, 1, 10, 0), (1, 1, 5, 0)])
    with pytest.raises(UserError) as error:
        data.load_dataset("nmnist", root=str(small_nmnist), num_time_steps=5, num_validation=10)
    text = str(error.value)
    assert f"5 problems with the files of {str(small_nmnist)!r}" in text
    for line in (
        "Train/3/00001.bin: size must be a positive multiple of 5 bytes; got 7",
        "Test/4/00000.bin: size must be a positive multiple of 5 bytes; got 0",
        "Train/5/00002.bin: event",
        "Train/6/00000.bin: event x must be 0 to 33; got 40 to 40",
        "Train/7/00000.bin: event times must not decrease",
    ):
        assert line in text, line


def test_folder_may_be_the_one_around(small_nmnist, tmp_path, monkeypatch):
    assert recorded.find_recordings("nmnist", str(small_nmnist), download=False) == small_nmnist
    around = tmp_path / "around"
    around.mkdir()
    (around / "NMNIST").symlink_to(small_nmnist)
    assert recorded.find_recordings("nmnist", str(around), download=False) == around / "NMNIST"
    monkeypatch.setenv("SAST_JAX_DATA", str(around))
    assert recorded.find_recordings("nmnist", "", download=False) == around / "NMNIST"


def test_missing_wrong_or_empty_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SAST_JAX_DATA", raising=False)
    (tmp_path / "file").touch()
    (tmp_path / "empty" / "Train").mkdir(parents=True)
    (tmp_path / "empty" / "Test").mkdir()
    for root, message in (
        ("", "is not set"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path, "holds none; with recordings of N-MNIST it must hold Train/<digit>/"),
    ):
        with pytest.raises(UserError, match=message):
            recorded.find_recordings("nmnist", str(root), download=False)
    with pytest.raises(UserError, match=r"empty' holds no recordings of the training part"):
        data.load_dataset("nmnist", root=str(tmp_path / "empty"), num_time_steps=3, num_validation=0)


def test_existing_folder_is_kept_and_a_failed_download_says_what_to_do(small_nmnist, tmp_path, monkeypatch):
    import tonic

    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(tonic.datasets, "NMNIST", fail)
    assert recorded.find_recordings("nmnist", str(small_nmnist), download=True) == small_nmnist
    with pytest.raises(UserError, match=r"could not download.*no network.*Train.zip and Test.zip"):
        recorded.find_recordings("nmnist", str(tmp_path / "new"), download=True)


def test_download_is_left_to_tonic(small_nmnist, tmp_path, monkeypatch):
    import tonic

    asked = []

    def download(save_to, train):
        asked.append(train)
        part = "Train" if train else "Test"
        shutil.copytree(small_nmnist / part, Path(save_to) / "NMNIST" / part)

    monkeypatch.setattr(tonic.datasets, "NMNIST", download)
    folder = recorded.find_recordings("nmnist", str(tmp_path / "new"), download=True)
    assert folder == tmp_path / "new" / "NMNIST"
    assert sorted(path.name for path in folder.iterdir()) == ["Test", "Train"]
    assert asked == [True, False]
    shutil.rmtree(folder / "Test")  # What is there is not downloaded again.
    recorded.find_recordings("nmnist", str(tmp_path / "new"), download=True)
    assert asked == [True, False, False]


def test_real_recordings_are_read_whole(nmnist_root):
    recordings = read_nmnist(nmnist_root, num_time_steps=10)
    assert len(recordings.labels) == 900
    assert np.bincount(recordings.labels[np.char.startswith(recordings.ids, "Test/")]).tolist() == [20] * 10
    files = [nmnist_root / f"{name}.bin" for name in recordings.ids]
    num_events = np.array([file.stat().st_size // 5 for file in files])
    kept = recordings.frames.sum((1, 2, 3, 4), dtype=np.int64)
    assert (kept <= num_events).all()
    assert kept.sum() / num_events.sum() > 0.99


def test_cache_is_read_unless_damaged_or_described_otherwise(recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    built = []

    def build():
        built.append(1)
        return recordings

    description = {"name": "toy", "num_time_steps": 3}
    for expected in (1, 1):
        loaded = cache.load_or_build(description, build)
        assert len(built) == expected
        for a, b in zip(loaded, recordings, strict=True):
            np.testing.assert_array_equal(a, b)
    cache.load_or_build({**description, "num_time_steps": 4}, build)
    assert len(built) == 2
    (path,) = tmp_path.glob("toy-*.npz") if len(list(tmp_path.iterdir())) == 1 else sorted(tmp_path.glob("toy-*.npz"))[:1]
    for i, damage in enumerate((lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: flip(raw, len(raw) // 3))):
        path.write_bytes(damage(path.read_bytes()))
        for steps in (3, 4):
            cache.load_or_build({**description, "num_time_steps": steps}, build)
        assert len(built) == 3 + i


def test_no_flipped_byte_of_a_cache_file_changes_what_is_loaded(recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    cache.load_or_build({"name": "toy"}, lambda: recordings)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    for position in [*range(0, 80), *range(80, len(raw), 29)]:
        path.write_bytes(flip(raw, position))
        for a, b in zip(cache.load_or_build({"name": "toy"}, lambda: recordings), recordings, strict=True):
            np.testing.assert_array_equal(a, b)


def test_cache_that_cannot_be_written_is_a_message(recordings, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"cannot write the cache.*SAST_JAX_CACHE"):
        cache.load_or_build({"name": "toy"}, lambda: recordings)


def flip(raw, position):
    return raw[:position] + bytes([raw[position] ^ 33]) + raw[position + 1 :]


def test_cache_never_unpickles(recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    cache.load_or_build({"name": "toy"}, lambda: recordings)
    (path,) = tmp_path.iterdir()
    np.savez(path, **{**recordings._asdict(), "ids": recordings.ids.astype(object)}, checksum=np.array("x"))
    loaded = cache.load_or_build({"name": "toy"}, lambda: recordings)
    assert loaded.ids.dtype.kind == "U"


def test_epoch_of_a_stream_is_a_permutation_and_streams_differ():
    def epoch(stream, number, seed=5):
        steps = range(4 * number, 4 * number + 4)
        return np.concatenate([batch_indices(12, 3, seed=seed, stream=stream, step=step) for step in steps]).tolist()

    epochs = [epoch(DESCENT, 0), epoch(DESCENT, 1), epoch(PERTURBATION, 0), epoch(DESCENT, 0, seed=6)]
    assert all(sorted(each) == list(range(12)) for each in epochs)
    assert len({tuple(each) for each in epochs}) == 4


def test_perturbation_stream_says_nothing_about_the_descent_stream():
    # Under independence two batches of 10 out of 100 share 1 sample on average (hypergeometric, variance 0.818).
    shared = [
        len(np.intersect1d(*(batch_indices(100, 10, seed=0, stream=stream, step=step) for stream in (DESCENT, PERTURBATION))))
        for step in range(2000)
    ]
    assert np.mean(shared) == pytest.approx(1.0, abs=4 * np.sqrt(0.818 / 2000))


@given(batch_size=st.integers(1, 9))
def test_evaluation_batches_hold_each_sample_once_under_their_mask(batch_size):
    rng = np.random.default_rng(1)
    recordings = cache.Recordings(
        rng.integers(0, 3, (7, 3, 4, 4, 2)).astype(np.uint8), np.arange(7, dtype=np.int32), np.arange(7).astype(str)
    )
    batches = list(evaluation_batches(recordings, batch_size))
    assert {batch.frames.shape for batch in batches} == {(3, batch_size, 4, 4, 2)}
    assert np.concatenate([batch.labels[batch.mask] for batch in batches]).tolist() == list(range(7))
    frames = np.concatenate([batch.frames[:, batch.mask] for batch in batches], axis=1)
    np.testing.assert_array_equal(frames.swapaxes(0, 1), recordings.frames)
