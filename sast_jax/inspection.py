"""What is in a data set, in numbers and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from sast_jax import data
from sast_jax.errors import UserError
from sast_jax.files import atomic_write
from sast_jax.text import align

_BRIGHTER, _DARKER = (31, 90, 200), (215, 90, 30)
_COLUMNS = 10  # Of frames in a strip.


def summarize(**dataset: Any) -> dict[str, Any]:
    """Returns what a data set holds, as JSON values.

    Args:
        **dataset: Arguments of `load_dataset`.

    Returns:
        `name`, `origin`, `licence`, `sensor_size`, `frames` (shape of a recording), `frame_milliseconds` (`None` if recordings
        differ in length), `notes`, `num_skipped`, `checksum` and, for each of `parts`, its number of recordings, its `classes`
        (how many of each, by name), the mean, least and greatest number of `events` in the frames of a recording, their mean
        number per second (`None` likewise) and the share of them that are `brighter`.
    """
    splits = data.load_dataset(**{**dataset, "binary": False})
    entry = data.CATALOGUE[dataset["name"]]
    duration, images = splits.duration, dataset.get("images")
    shape = splits.train.frames.shape[1:]
    parts = {}
    for name in ("train", "validation", "test"):
        part = getattr(splits, name)
        counts = np.array([(int(frames[..., 0].sum(dtype=int)), int(frames[..., 1].sum(dtype=int))) for frames in part.frames])
        events = counts.sum(1) if len(counts) else np.zeros(1)
        parts[name] = {
            "recordings": len(part.labels),
            "classes": dict(
                zip(entry.classes, np.bincount(part.labels, minlength=len(entry.classes)).tolist(), strict=True),
            ),
            "events": {"mean": float(events.mean()), "least": int(events.min()), "greatest": int(events.max())},
            "events_per_second": float(events.mean() / duration * 1e6) if duration else None,
            "brighter": float(counts[:, 1].sum() / max(events.sum(), 1)) if len(counts) else None,
        }
    return {
        "name": dataset["name"],
        "origin": f"simulated event camera over the images in {images!r}" if images else entry.origin,
        "licence": "that of the images" if images else entry.licence,
        "sensor_size": list(entry.sensor_size),
        "frames": list(shape),
        "frame_milliseconds": duration / shape[0] / 1e3 if duration else None,
        "parts": parts,
        "num_skipped": splits.num_skipped,
        "notes": list(splits.notes),
        "checksum": splits.describe()["checksum"],
    }


def format_summary(summary: dict[str, Any]) -> str:
    """Returns the summary as text: a heading, the parts, a line per class and the notes."""
    length = f"{summary['frame_milliseconds']:g} ms each" if summary["frame_milliseconds"] else "of the recording's own length"
    steps, height, width, _ = summary["frames"]
    parts = {name: part for name, part in summary["parts"].items() if part["recordings"]}
    rows = [["", *parts], ["recordings", *(str(part["recordings"]) for part in parts.values())]]
    rows.append(["events in a recording, mean", *(f"{part['events']['mean']:,.0f}" for part in parts.values())])
    rows += [
        [f"events in a recording, {which}", *(f"{part['events'][which]:,}" for part in parts.values())]
        for which in ("least", "greatest")
    ]
    if summary["frame_milliseconds"]:
        rows.append(["events per second of frames", *(f"{part['events_per_second']:,.0f}" for part in parts.values())])
    rows.append(["of them brighter", *(f"{part['brighter']:.1%}" for part in parts.values())])
    for label, name in enumerate(parts["train"]["classes"]):
        rows.append([f"class {label}, {name}", *(str(part["classes"][name]) for part in parts.values())])
    return "\n".join(
        [
            f"{summary['name']}: {summary['origin']}; licence {summary['licence']}",
            f"{steps} frames of {height} x {width} pixels, {length}; sensor {' x '.join(map(str, summary['sensor_size']))}",
            align(rows),
            *(f"note: {note}" for note in summary["notes"]),
        ]
    )


def draw_recording(path: Path, recording: str = "", **dataset: Any) -> str:
    """Draws a recording: brighter pixels blue, darker ones orange, both at once dark.

    Args:
        path: Picture to write: a strip of its frames (`.png`), or an animation of them in real time (`.gif`).
        recording: Its id; empty: the first of the training part.
        **dataset: Arguments of `load_dataset`.

    Returns:
        The caption of the picture.

    Raises:
        UserError: If there is no such recording, or Pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise UserError('drawing needs Pillow; install it with pip install "sast_jax[plots]"') from error
    splits = data.load_dataset(**{**dataset, "binary": False})
    frames, label, name = _find(splits, recording)
    entry = data.CATALOGUE[dataset["name"]]
    milliseconds = splits.duration / len(frames) / 1e3
    length = f" of {milliseconds:g} ms" if milliseconds else ""
    caption = f"{dataset['name']} {name}\n{entry.classes[label]}, {len(frames)} frames{length}"

    is_strip = path.suffix == ".png"
    scale = max(1, (128 if is_strip else 384) // frames.shape[1])
    tiles = _color(frames).repeat(scale, 1).repeat(scale, 2)
    height, width = tiles.shape[1:3]
    columns = min(_COLUMNS, len(tiles)) if is_strip else 1
    num_tiles = len(tiles) if is_strip else 1
    margin, gap = 30, 2
    size = (columns * (width + gap) + gap, margin + -(-num_tiles // columns) * (height + gap))
    pages = []
    for start in range(0, len(tiles), num_tiles):
        page = Image.new("RGB", size, (160, 160, 160))
        ImageDraw.Draw(page).text((gap, 1), caption, fill=(0, 0, 0), font_size=11)
        for i, tile in enumerate(tiles[start : start + num_tiles]):
            row, column = divmod(i, columns)
            page.paste(Image.fromarray(tile), (gap + column * (width + gap), margin + row * (height + gap)))
        pages.append(page)
    animation = {} if is_strip else {"save_all": True, "append_images": pages[1:], "loop": 0, "duration": milliseconds or 100}
    with atomic_write(path, follow=True) as file:
        pages[0].save(file, format=path.suffix[1:], **animation)
    return caption


def _find(splits, recording):
    for part in (splits.train, splits.validation, splits.test):
        found = np.flatnonzero(part.ids == recording) if recording else np.arange(len(part.ids))
        if len(found):
            return part.frames[found[0]], part.labels[found[0]], part.ids[found[0]]
    raise UserError(f"--recording: there is none of the id {recording!r}; ids are as {str(splits.train.ids[0])!r}")


def _color(frames: np.ndarray) -> np.ndarray:
    """Colors `[T, H, W, 3]` of event counts `[T, H, W, 2]`, white where there are none."""
    strong = max(1.0, float(np.quantile(frames[frames > 0], 0.9))) if frames.any() else 1.0
    strength = np.minimum(frames / strong, 1.0) ** 0.5
    paint = np.stack([255 - np.array(_DARKER), 255 - np.array(_BRIGHTER)])
    return np.clip(255 - strength @ paint, 0, 255).astype(np.uint8)
