"""A convolution whose value and gradient reach the compiler in the forms that it has fast kernels for."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 2
MAX_CHANNELS, MIN_KERNEL_SIZE = 4, 5
"""Where blocks pay: with more channels there is little to gain, and of smaller kernels they make too many products with zeros."""


@jax.custom_vjp
def convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with stride 1 and zero padding to the same size.

    The same sums as `jax.lax.conv_general_dilated`, up to rounding, in another order of work:

    - XLA rewrites the gradient of a convolution for its fast kernels, but not inside a while loop (jax issue 12868), so the
      weight gradient is written here as a convolution of explicitly transposed operands: images as the channels they are
      contracted over, the output's cotangent as the kernel.
    - On a CPU images of few channels are first folded into blocks of 2 x 2 pixels as channels, the kernel with them: up to
      twice as many products, of which the added ones are with zeros, in a form that is faster by more than that.

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
    if kernel.shape[2] > MAX_CHANNELS or min(kernel.shape[:2]) < MIN_KERNEL_SIZE:
        return _convolve_same(images, kernel)
    return lax.platform_dependent(images, kernel, cpu=_convolve_blocks, default=_convolve_same)


def _convolve_blocks(images, kernel):
    batch_size, *sizes, channels = images.shape
    features = kernel.shape[-1]
    numbers = [-(-size // BLOCK) for size in sizes]  # Of blocks; at odd sizes the last ones reach over the border.
    images = jnp.pad(images, ((0, 0), *((0, BLOCK * n - size) for n, size in zip(numbers, sizes, strict=True)), (0, 0)))
    images = images.reshape(batch_size, numbers[0], BLOCK, numbers[1], BLOCK, channels).swapaxes(2, 3)
    images = images.reshape(batch_size, *numbers, BLOCK**2 * channels)
    blocks = _convolve(images, *_kernel_of_blocks(kernel)).reshape(batch_size, *numbers, BLOCK, BLOCK, features)
    output = blocks.swapaxes(2, 3).reshape(batch_size, *(BLOCK * n for n in numbers), features)
    return output[:, : sizes[0], : sizes[1]]


def _kernel_of_blocks(kernel):
    """Returns the kernel between blocks of pixels, `[h', w', BLOCK^2 C, BLOCK^2 F]`, and its padding.

    Pixel `a` of an output block is reached by tap `i` from pixel `a + i - low` of the input, counted from the block's first
    one: so its weights stand in the new kernel, laid out pixel by pixel, `a - low` behind those pixels.
    """
    heights, widths, channels, features = kernel.shape
    (low_y, high_y), (low_x, high_x) = _same_padding(kernel)
    # Blocks that are reached before and after an output block.
    padding = [(-(-low // BLOCK), (BLOCK - 1 + high) // BLOCK) for low, high in ((low_y, high_y), (low_x, high_x))]
    (before_y, after_y), (before_x, after_x) = padding
    rows, columns = before_y + 1 + after_y, before_x + 1 + after_x

    def shifted(a, b):
        top, left = BLOCK * before_y + a - low_y, BLOCK * before_x + b - low_x
        bottom, right = BLOCK * rows - top - heights, BLOCK * columns - left - widths
        return jnp.pad(kernel, ((top, bottom), (left, right), (0, 0), (0, 0)))

    pixels = jnp.stack([jnp.stack([shifted(a, b) for b in range(BLOCK)], 3) for a in range(BLOCK)], 3)
    pixels = pixels.reshape(rows, BLOCK, columns, BLOCK, channels, BLOCK**2 * features).swapaxes(1, 2)
    return pixels.reshape(rows, columns, BLOCK**2 * channels, BLOCK**2 * features), padding


def _fwd(images, kernel):
    return _forward(images, kernel), (images, kernel)


def _bwd(residuals, cotangent):
    images, kernel = residuals
    padding = _same_padding(kernel)
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    images_cotangent = _convolve(cotangent, flipped, [(high, low) for low, high in padding])

    operands = images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
    kernel_cotangent = _convolve(*lax.optimization_barrier(operands), padding)
    return images_cotangent, kernel_cotangent.transpose(1, 2, 0, 3)


convolution.defvjp(_fwd, _bwd)


class Convolution(nn.Module):
    """`convolution` with a bias; weights as in `flax.linen.Conv`.

    Attributes:
        features: Number of output channels F.
        kernel_size: Height and width of the kernel.
        kernel_init: Initializer of the kernel.
        dtype: To what images and weights are cast; `None`: not at all.
    """

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Applies it to `[B, H, W, C]`."""
        shape = self.kernel_size, self.kernel_size, images.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        return convolution(images, kernel) + bias
