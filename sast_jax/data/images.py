"""Images of MNIST's files, as they are distributed."""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sast_jax.errors import UserError

_MAGIC = b"\0\0\x08"  # Unsigned bytes; the number of dimensions follows.


class Images(NamedTuple):
    """Images with labels.

    Attributes:
        pixels: uint8 `[N, h, w]`.
        labels: uint8 `[N]`.
    """

    pixels: np.ndarray
    labels: np.ndarray


def load_mnist(folder: Path, part: str) -> Images:
    """Loads the images of MNIST's `train` or `t10k` part, or of any set in that form (Fashion-MNIST, Kuzushiji-MNIST).

    Args:
        folder: Holds `<part>-images-idx3-ubyte` and `<part>-labels-idx1-ubyte`, with or without `.gz`.
        part: `train` or `t10k`.

    Raises:
        UserError: If a file is missing, damaged or no idx file, or if images and labels differ in number.

    References:
        LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document Recognition. Proceedings of the IEEE 1998.
    """
    arrays = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        files = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
        if not files:
            raise UserError(
                f"dataset.images: {str(folder)!r} has no {name} or {name}.gz; give a folder of MNIST's files, {{train,t10k}}-"
                "{images-idx3,labels-idx1}-ubyte with or without .gz"
            )
        try:
            arrays.append(read_idx(files[0], 3 if "images" in name else 1))
        except (ValueError, OSError, EOFError, zlib.error) as error:  # The last two are what damaged archives raise.
            raise UserError(f"dataset.images: {files[0]}: {error}") from error
    pixels, labels = arrays
    if len(pixels) != len(labels):
        raise UserError(f"dataset.images: {str(folder)!r} has {len(pixels)} images but {len(labels)} labels of {part}")
    return Images(pixels, labels)


def read_idx(file: Path, num_dimensions: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, packed by gzip if its name ends so.

    Raises:
        ValueError: If it is no such file or of another size than it says.
    """
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    header = 4 + 4 * num_dimensions
    if raw[:4] != _MAGIC + bytes([num_dimensions]) or len(raw) < header:
        raise ValueError(f"is no idx file of unsigned bytes in {num_dimensions} dimensions; begins with {raw[:4]!r}")
    shape = np.frombuffer(raw[4:header], ">u4").astype(int)
    if len(raw) - header != np.prod(shape, dtype=object) or not len(raw) > header:
        raise ValueError(f"says it holds {' x '.join(map(str, shape))} bytes; holds {len(raw) - header} (truncated, or damaged)")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
