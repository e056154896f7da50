import json

import numpy as np
import pytest

from sast_jax.cli import main
from sast_jax.inspection import draw_recording, format_summary, summarize

SMALL = ["--config.dataset.num_time_steps=4", "--config.dataset.num_validation=10", "--config.network.kind=mlp"]


@pytest.fixture
def run(small_nmnist, tmp_path, capsys):
    """Returns a function that runs `sast-jax data` on the small N-MNIST folder and returns status, output and errors."""

    def command(*arguments, config="configs/nmnist.py", root=small_nmnist):
        status = main(["data", *arguments, f"--config={config}", f"--config.dataset.root={root}", *SMALL])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_info_counts_recordings_and_events_and_names_the_licence(run, tmp_path):
    status, out, _ = run("info", f"--workdir={tmp_path / 'out'}")
    assert status == 0
    assert "N-MNIST (Orchard" in out
    assert "licence CC BY-SA 4.0" in out
    rows = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in out.splitlines() if line.split()[-1].isdigit()}
    assert rows["recordings"] == ["30", "10", "20"]
    assert rows["class 7, 7"] == ["3", "1", "2"]
    assert rows["events in a recording, greatest"] == ["400", "400", "400"]
    summary = json.loads((tmp_path / "out" / "data.json").read_text())
    assert summary["frames"] == [4, 34, 34, 2]
    assert summary["parts"]["test"]["events_per_second"] == pytest.approx(400 / 0.31)
    assert 0.4 < summary["parts"]["train"]["brighter"] < 0.6


def test_recordings_that_differ_in_length_are_described_without_rates(small_gestures, tmp_path):
    own = {"name": "dvs_gesture", "num_time_steps": 4, "num_validation": 0, "root": str(small_gestures), "downsample": 4}
    summary = summarize(**own)
    assert summary["parts"]["test"]["recordings"] == 22
    assert list(summary["parts"]["train"]["classes"])[10] == "other gestures"
    assert summary["frame_milliseconds"] is None
    assert "of the recording's own length" in format_summary(summary)
    assert "events per second" not in format_summary(summary)
    assert draw_recording(tmp_path / "a.gif", **own).endswith("hand clapping, 4 frames")
    assert summarize(**own, duration=0.8)["frame_milliseconds"] == 200


def test_prepare_fills_the_cache_and_nothing_is_read_again(run, small_nmnist, monkeypatch, tmp_path):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path / "cache"))
    status, out, _ = run("prepare")
    assert status == 0
    assert '"num_train": 30, "num_validation": 10, "num_test": 20' in out
    assert str(tmp_path / "cache") in out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr("sast_jax.data.decoders.read_nmnist_file", lambda file: pytest.fail("read again"))
    assert run("prepare")[1] == out


def test_skipped_files_are_counted_and_named(run, small_nmnist):
    (small_nmnist / "Train/3/00001.bin").write_bytes(b"1234567")
    status, _, err = run("prepare")
    assert status == 2
    assert "Train/3/00001.bin: size must be" in err
    for action in ("prepare", "info"):
        status, out, _ = run(action, "--config.dataset.skip_bad=true")
        assert status == 0
        assert "1 problem with the files of" in out
        assert "Train/3/00001.bin: size must be a positive multiple of 5 bytes; got 7" in out


@pytest.mark.parametrize("format", ["png", "gif"])
def test_view_draws_a_recording_where_its_events_are(run, tmp_path, format):
    from PIL import Image

    status, out, _ = run("view", f"--workdir={tmp_path}", "--recording=Train/4/00002", f"--format={format}")
    assert status == 0
    path = tmp_path / f"nmnist-Train-4-00002.{format}"
    assert out.splitlines() == ["nmnist Train/4/00002", "4, 4 frames of 77.5 ms", str(path)]
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) == {"png": 1, "gif": 4}[format]
        pixels = np.asarray(picture.convert("RGB"), float)[32:-2, 2:-2]
    tile = pixels[: pixels.shape[0], : pixels.shape[0]]
    ink = (255 - tile).sum(2)
    center = np.array([(ink.sum(axis) * np.arange(len(tile))).sum() for axis in (1, 0)]) / ink.sum() / len(tile) * 34
    np.testing.assert_allclose(center, [8, 5 + 6 * 4], atol=1.5)  # Where the fixture puts the blob of digit 4.


def test_unknown_recording_is_refused(run, tmp_path):
    status, _, err = run("view", f"--workdir={tmp_path}", "--recording=Train/4/99999")
    assert status == 2
    assert "--recording: there is none of the id 'Train/4/99999'; ids are as 'Train/0/" in err


def test_missing_pillow_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    status, _, err = run("view")
    assert status == 2
    assert 'pip install "sast_jax[plots]"' in err
