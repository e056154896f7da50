"""A convolution and a pool whose values and gradients reach the compiler in the forms that it is fast at."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from sast_jax.spikes import DerivativeRule

MAX_CHANNELS, MAX_FEATURES, MIN_KERNEL_WIDTH = 8, 16, 3
"""Where pairs paid, forward and in image gradients: with more features, or channels, a convolution is fast as it is."""

MIN_WIDTH_OF_PAIRS = 5
"""Width of a kernel from which on pairs paid in weight gradients: they double the products of one 3 wide."""

MAX_BATCH_SIZE = 16
"""With more samples XLA has a fast kernel for weight gradients of few features in single pixels."""

MAX_PART = 2**18
"""Bytes of the cotangent that a weight gradient takes at once, about: a core's own cache has room for them."""

MAX_PARTS = 8
"""Most parts, as each is compiled for itself."""

SLOW_CALLS = jax.__version_info__ >= (0, 11)
"""Whether this version of XLA takes longer for a call of its fast kernel, of which there is one a row."""


@jax.custom_vjp
def convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with stride 1 and zero padding to the same size.

    The same sums as `jax.lax.conv_general_dilated`, up to rounding, in another order of work:

    - XLA rewrites the gradient of a convolution for its fast kernels, but not inside a while loop (jax issue 12868), so the
      weight gradient is written here as a convolution of explicitly transposed operands: images as the channels they are
      contracted over, the output's cotangent as the kernel.
    - On a CPU convolutions of few channels and features take two neighbouring pixels of a row as one with twice the channels, and
      the kernel with them: up to twice as many products, of which the added ones are with zeros, in a form that is faster by more
      than that. In memory such pairs are what single pixels are. Of at most half as many features they take four. All that a
      kernel's width reaches are then the channels of one pixel, and all rows of an image one, as XLA calls its fast kernel for
      each row.
    - Weight gradients of few features take all that a kernel's width reaches as channels, too, and those of few channels and wide
      kernels pairs. They are sums over parts of the samples, as for each row and channel of its result that fast kernel reads the
      whole cotangent; but not of few features and more than `MAX_BATCH_SIZE` samples without pairs. Parts have even numbers of
      samples, with one of zeros where it must be: of an odd number, with vectors of 512 bits and few features, that kernel takes
      several times as long.
    - Image gradients of few channels and features take pairs. Where `SLOW_CALLS`, they do with any number of features, and weight
      gradients of many features take all samples at once.

    Args:
        images: `[B, H, W, C]`.
        kernel: `[h, w, C, F]`.

    Returns:
        `[B, H, W, F]`.
    """
    return _forward(images, kernel)


def _same_padding(kernel):
    return [((size - 1) // 2, size // 2) for size in kernel.shape[:2]]


def _convolve(images, kernel, padding):
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_same(images, kernel):
    return _convolve(images, kernel, _same_padding(kernel))


def _forward(images, kernel):
    _, width, channels, features = kernel.shape
    if channels > MAX_CHANNELS or features > MAX_FEATURES or width < MIN_KERNEL_WIDTH:
        return _convolve_same(images, kernel)
    return lax.platform_dependent(images, kernel, cpu=_convolve_few, default=_convolve_same)


def _convolve_few(images, kernel):
    size = 4 if kernel.shape[-1] <= MAX_FEATURES // 2 else 2
    return _convolve_groups(images, kernel, _same_padding(kernel), size, _convolve_end_to_end)


def _convolve_groups(images, kernel, padding, size=2, convolve=_convolve):
    output = convolve(_in_groups(images, size), *_kernel_of_groups(kernel, padding, size))
    return output.reshape(*output.shape[:2], -1, kernel.shape[-1])[:, :, : images.shape[2]]


def _convolve_end_to_end(images, kernel, padding):
    """`_convolve` with the rows of an image end to end: what is one row below is `width` pixels further."""
    batch_size, _, width, _ = images.shape
    num_rows, _, _, features = kernel.shape
    (above, below), sides = padding
    images = _within_reach(images, sides)
    output = lax.conv_general_dilated(
        images.reshape(batch_size, 1, -1, images.shape[-1]),
        kernel.reshape(1, num_rows, -1, features),
        (1, 1),
        [(0, 0), (above * width, below * width)],
        rhs_dilation=(1, width),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return output.reshape(batch_size, -1, width, features)


def _within_reach(images, sides):
    """Returns what each pixel has so far to its left and right as its channels, from left to right."""
    width = images.shape[2]
    images = jnp.pad(images, ((0, 0), (0, 0), sides, (0, 0)))
    return jnp.concatenate([images[:, :, tap : tap + width] for tap in range(sum(sides) + 1)], -1)


def _in_groups(images, size=2):
    """Returns some neighbouring pixels as one; the last ones may reach over the border."""
    batch_size, height, width, channels = images.shape
    return jnp.pad(images, ((0, 0), (0, 0), (0, -width % size), (0, 0))).reshape(batch_size, height, -1, size * channels)


def _kernel_of_groups(kernel, padding, size=2):
    """Returns the kernel between groups of n pixels, `[h, w', n C, n F]`, and its padding.

    Pixel `a` of an output group is reached by tap `i` from pixel `a + i - low` of the input, counted from the group's first one:
    so its weights stand in the new kernel, laid out pixel by pixel, `a - low` behind that pixel.
    """
    height, width, channels, features = kernel.shape
    rows, (low, high) = padding
    before, after = -(-low // size), (size - 1 + high) // size  # Groups that are reached beside the one at the same place.
    num_groups = before + 1 + after

    def shifted(a):
        left = size * before + a - low
        return jnp.pad(kernel, ((0, 0), (left, size * num_groups - left - width), (0, 0), (0, 0)))

    pixels = jnp.stack([shifted(a) for a in range(size)], 3)
    return pixels.reshape(height, num_groups, size * channels, size * features), [rows, (before, after)]


def _fwd(images, kernel):
    return _forward(images, kernel), (images, kernel)


def _bwd(residuals, cotangent):
    images, kernel = residuals
    images_cotangent = _images_gradient(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    return images_cotangent, lax.platform_dependent(
        images, cotangent, kernel, cpu=_kernel_gradient_in_parts, default=_kernel_gradient
    )


def _images_gradient(cotangent, flipped):
    padding = [(high, low) for low, high in _same_padding(flipped)]
    single, pairs = functools.partial(_convolve, padding=padding), functools.partial(_convolve_groups, padding=padding)
    _, width, features, channels = flipped.shape
    if channels > MAX_FEATURES or width < MIN_KERNEL_WIDTH or (features > MAX_FEATURES and not SLOW_CALLS):
        return single(cotangent, flipped)
    return lax.platform_dependent(cotangent, flipped, cpu=pairs, default=single)


def _kernel_gradient(images, cotangent, kernel):
    return _correlate(images, cotangent, _same_padding(kernel))


def _kernel_gradient_in_parts(images, cotangent, kernel):
    if not isinstance(images.shape[0], int):  # A symbolic number of samples, as in `jax.export`, has no known parts.
        return _kernel_gradient(images, cotangent, kernel)
    _, width, channels, features = kernel.shape
    if features > MAX_FEATURES:
        return _sum_of_parts(_correlate, images, cotangent, _same_padding(kernel), 1 if SLOW_CALLS else MAX_PARTS)
    is_in_pairs = channels <= MAX_CHANNELS and width >= MIN_WIDTH_OF_PAIRS
    if len(images) > MAX_BATCH_SIZE and not is_in_pairs:
        return _sum_of_parts(_correlate, images, cotangent, _same_padding(kernel), 1)
    size = 2 if is_in_pairs else 1
    _, back, padding = jax.vjp(lambda kernel: _kernel_of_groups(kernel, _same_padding(kernel), size), kernel, has_aux=True)
    return back(_sum_of_parts(_correlate_rows, _in_groups(images, size), _in_groups(cotangent, size), padding, MAX_PARTS))[0]


def _sum_of_parts(correlate, images, cotangent, padding, max_parts):
    """Returns the sum of `correlate` over parts of the samples, of even numbers of them."""
    number = len(images)
    size = 2
    while size < number and (2 * size * cotangent.nbytes <= number * MAX_PART or size * max_parts < number):
        size *= 2
    if number > 1:
        images, cotangent = (jnp.pad(x, [(0, number % 2)] + 3 * [(0, 0)]) for x in (images, cotangent))
    parts = [slice(start, start + size) for start in range(0, max(1, number), size)]
    return sum(correlate(images[part], cotangent[part], padding) for part in parts)


def _correlate_rows(images, cotangent, padding):
    """`_correlate`, where a row of all samples is contracted at once."""
    rows, sides = padding
    channels, features, height = images.shape[-1], cotangent.shape[-1], images.shape[1]
    operands = [x.transpose(1, 2, 0, 3).reshape(1, height, -1, x.shape[-1]) for x in (_within_reach(images, sides), cotangent)]
    images, cotangent = lax.optimization_barrier((operands[0].transpose(3, 0, 1, 2), operands[1]))
    kernel = _convolve(images, cotangent, [(0, 0), rows])
    return kernel.reshape(sum(sides) + 1, channels, -1, features).transpose(2, 0, 1, 3)


def _correlate(images, cotangent, padding):
    operands = images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
    return _convolve(*lax.optimization_barrier(operands), padding).transpose(1, 2, 0, 3)


convolution.defvjp(_fwd, _bwd)


def rows(images: jax.Array) -> jax.Array:
    """Returns `[..., W, C]` as `[..., W * C]`; on a CPU XLA's loops over few channels are several times slower than over rows."""
    return images.reshape(*images.shape[:-2], -1)


def _apart(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns the function as one that XLA on a CPU joins with nothing that comes after it.

    What repeats a number, joined with element-wise work, would decide how its loops run and make them slow.
    """

    def apart(x):
        with set_xla_metadata(inlineable="false"):
            return jax.jit(function)(x)

    return lambda x: lax.platform_dependent(x, cpu=apart, default=function)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_windows(images: jax.Array, size: int) -> jax.Array:
    """Sums over windows of some height and width that do not overlap; an incomplete one at the border is dropped.

    As a sum of strided images: on a CPU XLA joins that with what comes before it, in one pass over memory, and a sum over axes
    not. With a gradient it is kept apart from what comes after it: else XLA sums twice, for the next layer and for the copy that
    the gradient of its weights needs. The gradient repeats the cotangent, apart from what comes after it.

    Args:
        images: `[B, H, W, C]`, of a floating-point dtype.
        size: Height and width k of a window.

    Returns:
        `[B, H // k, W // k, C]`.
    """
    return _sum_windows(images, size)


def sum_windows_jvp(images: jax.Array, size: int) -> jax.Array:
    """Equals `sum_windows`, with the compiler's own derivative, for forward mode, too."""
    return _windows(images, size).sum((2, 4))


def _sum_windows(images, size):
    windows = _windows(images, size)
    return functools.reduce(jnp.add, [windows[:, :, row, :, column] for row in range(size) for column in range(size)])


def _windows(images, size):
    batch_size, height, width, channels = images.shape
    rows, columns = height // size, width // size
    return images[:, : rows * size, : columns * size].reshape(batch_size, rows, size, columns, size, channels)


def _sum_windows_fwd(images, size):
    _, back = jax.vjp(functools.partial(sum_windows_jvp, size=size), images)
    return _apart(functools.partial(_sum_windows, size=size))(images), back


def _sum_windows_bwd(size, back, cotangent):
    del size
    return (_apart(lambda cotangent: back(cotangent)[0])(cotangent),)


sum_windows.defvjp(_sum_windows_fwd, _sum_windows_bwd)


class Convolution(nn.Module):
    """`convolution` with a bias; weights as in `flax.linen.Conv`, in float32.

    Attributes:
        features: Number of output channels F.
        kernel_size: Height and width of the kernel.
        kernel_init: Initializer of the kernel.
        dtype: To what images and weights are cast; `None`: not at all.
        derivative_rule: `vjp`: that of `convolution`, for reverse mode. `jvp`: the compiler's own, for forward mode, too.
    """

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Any = None
    derivative_rule: DerivativeRule = "vjp"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Applies it to `[B, H, W, C]`."""
        shape = self.kernel_size, self.kernel_size, images.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        output = (convolution if self.derivative_rule == "vjp" else _convolve_same)(images, kernel)
        repeat = _apart(lambda bias: jnp.tile(bias, output.shape[-2]))
        return (rows(output) + repeat(bias)[None, None]).reshape(output.shape)
