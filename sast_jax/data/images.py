"""Images of MNIST's files, as they are distributed."""

import gzip
import io
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sast_jax.errors import UserError
from sast_jax.files import read_regular
from sast_jax.text import printable

_MAGIC = b"\0\0\x08"  # Unsigned bytes; the number of dimensions follows.

MAX_IDX_BYTES = 2**29
"""More than QMNIST, the largest set of digits in this form, has; a small archive may hold any number of bytes."""

_CHUNK = 2**22


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
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"dataset.images: {printable(str(files[0]))}: {reason}") from error
    pixels, labels = arrays
    if len(pixels) != len(labels):
        raise UserError(f"dataset.images: {str(folder)!r} has {len(pixels)} images but {len(labels)} labels of {part}")
    return Images(pixels, labels)


def read_idx(file: Path, num_dimensions: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, packed by gzip if its name ends so.

    Raises:
        ValueError: If it is no such file, of another size than it says, or larger than `MAX_IDX_BYTES`.
        OSError: If it is no regular file, or cannot be read.
    """
    packed = io.BytesIO(read_regular(file, MAX_IDX_BYTES + 4 + 4 * num_dimensions))
    stream = gzip.GzipFile(fileobj=packed) if file.suffix == ".gz" else packed
    magic, sizes = stream.read(4), stream.read(4 * num_dimensions)
    if magic != _MAGIC + bytes([num_dimensions]) or len(sizes) < 4 * num_dimensions:
        raise ValueError(f"is no idx file of unsigned bytes in {num_dimensions} dimensions; begins with {magic!r}")
    shape = np.frombuffer(sizes, ">u4").astype(int)
    expected, said = int(np.prod(shape, dtype=object)), " x ".join(map(str, shape))
    if expected > MAX_IDX_BYTES:
        raise ValueError(f"says it holds {said} bytes; {MAX_IDX_BYTES:,} are allowed")
    content = bytearray()
    while chunk := stream.read(min(_CHUNK, expected + 1 - len(content))):  # `read` takes memory for all it is asked for.
        content += chunk
    if len(content) != expected or not expected:
        found = f"holds {len(content)}" if len(content) <= expected else "holds more"
        raise ValueError(f"says it holds {said} bytes; {found} (truncated, or damaged)")
    return np.frombuffer(content, np.uint8).reshape(shape)
