import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax import convolution as module
from sast_jax.convolution import Convolution, convolution, sum_windows


def draw(batch_size, height, width, size, channels, features, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = (batch_size, height, width, channels), (*size, channels, features), (batch_size, height, width, features)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def by_hand(images, kernel):
    """Taps one by one, in NumPy."""
    (heights, widths), (height, width) = kernel.shape[:2], images.shape[1:3]
    tops, lefts = (heights - 1) // 2, (widths - 1) // 2
    padded = np.pad(images, ((0, 0), (tops, heights // 2), (lefts, widths // 2), (0, 0)))
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(heights) for j in range(widths))


def reference(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


SHAPES = {
    **{
        f"few channels, {features} features, {height}x{width}, kernel {size[0]}x{size[1]}": (
            3,
            height,
            width,
            size,
            channels,
            features,
        )
        for features, (height, width), channels in ((4, (7, 6), 2), (4, (8, 9), 3), (9, (7, 6), 2), (9, (8, 9), 3))
        for size in ((1, 1), (2, 4), (3, 3), (5, 5), (5, 8), (7, 6))
    },
    "more channels": (3, 7, 6, (5, 5), 10, 4),
    "more features": (3, 7, 6, (5, 5), 2, 20),
    "more samples": (17, 5, 6, (3, 3), 2, 4),
    "more samples, in pairs": (17, 5, 6, (5, 5), 2, 4),
    "more of both, odd": (3, 6, 7, (4, 4), 10, 20),
}


WAYS = {"jax 0.10": (False, 2**18), "jax 0.11": (True, 2**18), "jax 0.10, parts": (False, 1), "jax 0.11, parts": (True, 1)}


@pytest.mark.parametrize(
    ("way", "shapes"),
    [
        # Each shape one way, and each kernel more than one way.
        *((way, tuple(SHAPES)[index :: len(WAYS)]) for index, way in enumerate(WAYS)),
        *(pytest.param(way, tuple(SHAPES), marks=pytest.mark.slow) for way in WAYS),
    ],
    ids=[f"{which}, {way}" for which in ("some shapes", "all shapes") for way in WAYS],
)
def test_convolution_agrees_with_its_definition_and_lax_in_gradient(way, shapes, monkeypatch, float64):
    slow_calls, max_part = WAYS[way]
    for name, value in (("SLOW_CALLS", slow_calls), ("MAX_PART", max_part), ("MAX_PARTS", 2)):
        monkeypatch.setattr(module, name, value)
    jax.clear_caches()  # Else what was traced before counts.
    operands = [draw(*SHAPES[shape]) for shape in shapes]

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(convolve, operands):
        pulled = [(jax.vjp(convolve, images, kernel), cotangent) for images, kernel, cotangent in operands]
        return [(value, back(cotangent)) for (value, back), cotangent in pulled]

    results, expected = (value_and_gradient(convolve, operands) for convolve in (convolution, reference))
    for shape, (images, kernel, _), (value, gradient), (_, other) in zip(shapes, operands, results, expected, strict=True):
        np.testing.assert_allclose(value, by_hand(images, kernel), atol=1e-10, err_msg=shape)
        for a, b in zip(gradient, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10, err_msg=shape)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_convolution_keeps_the_dtype_in_value_and_gradient(dtype):
    images, kernel, cotangent = (jnp.asarray(x, dtype) for x in draw(2, 6, 6, (5, 5), 2, 4))

    def value_and_gradient(images, kernel, cotangent):
        value, gradient = jax.vjp(convolution, images, kernel)
        return value, *gradient(cotangent)

    assert {x.dtype for x in jax.jit(value_and_gradient)(images, kernel, cotangent)} == {jnp.dtype(dtype)}


def test_sums_of_integers_are_exact():
    rng = np.random.default_rng(0)
    images, kernel = (rng.integers(-99, 99, shape).astype(np.int32) for shape in ((2, 7, 6, 2), (5, 5, 2, 4)))
    np.testing.assert_array_equal(jax.jit(convolution)(images, kernel), by_hand(images, kernel))


def lowered(function, platform, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def kernel_gradient(images, kernel, cotangent):
    return jax.vjp(convolution, images, kernel)[1](cotangent)[1]


@pytest.mark.perf
def test_only_cpus_take_pixels_in_pairs_in_value_and_gradient():
    images, kernel, cotangent = draw(8, 20, 21, (5, 5), 2, 16, np.float32)
    assert "tensor<8x1x220x32xf32>" in lowered(convolution, "cpu", images, kernel)
    assert "tensor<8x1x120x32xf32>" in lowered(convolution, "cpu", images, kernel[..., :8])  # In fours.
    assert "tensor<1x20x88x32xf32>" in lowered(kernel_gradient, "cpu", images, kernel, cotangent)
    for platform in ("cuda", "tpu"):
        assert "x32xf32" not in lowered(convolution, platform, images, kernel)
        assert "x32xf32" not in lowered(kernel_gradient, platform, images, kernel, cotangent)


@pytest.mark.perf
@pytest.mark.parametrize(
    ("shape", "slow_calls", "part", "num_parts"),
    [
        ((17, 34, 34, (5, 5), 2, 16), False, "tensor<1x34x68x32xf32>", 5),  # 74 KiB each: four at once, for eight parts at most.
        ((17, 34, 34, (5, 5), 2, 16), True, "tensor<1x34x68x32xf32>", 5),
        ((80, 34, 34, (5, 5), 2, 16), False, "tensor<1x34x272x32xf32>", 5),
        ((9, 17, 17, (5, 5), 16, 32), False, "tensor<17x17x4x32xf32>", 3),  # 37 KiB each.
        ((9, 17, 17, (5, 5), 16, 32), True, "tensor<17x17x10x32xf32>", 1),  # At once, and one of zeros.
        ((1, 17, 17, (5, 5), 16, 32), False, None, 1),
        ((16, 34, 34, (3, 3), 2, 16), False, "tensor<1x34x68x16xf32>", 8),  # Without pairs, as kernels are narrow,
        ((16, 34, 34, (5, 5), 9, 16), False, "tensor<1x34x68x16xf32>", 8),  # or channels many; with more samples
        ((17, 34, 34, (3, 3), 2, 16), False, "tensor<34x34x18x16xf32>", 1),  # there is a fast kernel.
    ],
)
def test_only_cpus_take_weight_gradients_in_parts_of_even_size(shape, slow_calls, part, num_parts, monkeypatch):
    monkeypatch.setattr(module, "SLOW_CALLS", slow_calls)
    jax.clear_caches()

    def count_parts(platform):
        text = lowered(kernel_gradient, platform, *draw(*shape, np.float32))
        return text.count("stablehlo.convolution"), part is not None and part in text

    # Beside them the value and the images' gradient, which nothing needs.
    assert count_parts("cpu") == (num_parts + count_parts("cuda")[0] - 1, part is not None)
    assert not count_parts("tpu")[1]


@pytest.mark.perf
@pytest.mark.parametrize("slow_calls", [False, True], ids=["jax 0.10", "jax 0.11"])
def test_image_gradients_take_pairs_where_features_few_or_calls_slow(slow_calls, monkeypatch):
    monkeypatch.setattr(module, "SLOW_CALLS", slow_calls)
    for features, is_in_pairs in ((24, slow_calls), (12, True)):
        images, kernel, cotangent = draw(8, 20, 21, (5, 5), 16, features, np.float32)

        def gradient(images, kernel, cotangent):
            return jax.vjp(convolution, images, kernel)[1](cotangent)[0]

        assert ("tensor<8x20x11x32xf32>" in lowered(gradient, "cpu", images, kernel, cotangent)) == is_in_pairs
        for platform in ("cuda", "tpu"):
            assert "x32xf32" not in lowered(gradient, platform, images, kernel, cotangent)


@pytest.mark.perf
def test_only_on_cpus_the_compiler_is_kept_from_joining_operations():
    images = draw(8, 20, 21, (5, 5), 2, 16, np.float32)[0]
    layer = Convolution(4, 5)
    params = layer.init(jax.random.key(0), images)

    def gradient(params, images):
        return jax.grad(lambda params: sum_windows(layer.apply(params, images), 2).sum())(params)

    assert lowered(gradient, "cpu", params, images).count("inlineable") >= 3
    for platform in ("cuda", "tpu"):
        assert "inlineable" not in lowered(gradient, platform, params, images)


def test_gradient_may_be_differentiated_again(float64):
    images, kernel, cotangent = draw(3, 7, 6, (5, 5), 2, 4)

    def second(convolve):
        inner = jax.grad(lambda kernel: jnp.sum(cotangent * jnp.tanh(convolve(images, kernel))))
        return jax.grad(lambda kernel: jnp.sum(inner(kernel) ** 2))(kernel)

    ours, theirs = jax.jit(lambda: (second(convolution), second(reference)))()
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def assert_windows_equal_a_loop(shape, size, seed):
    rng = np.random.default_rng(seed)
    batch_size, height, width, channels = shape
    rows, columns = height // size, width // size
    images, cotangent = rng.normal(size=shape), rng.normal(size=(batch_size, rows, columns, channels))
    sums, gradient = np.zeros_like(cotangent), np.zeros_like(images)
    for row, column in np.ndindex(rows, columns):
        window = np.s_[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        sums[:, row, column] = images[window].sum((1, 2))
        gradient[window] = cotangent[:, row, column][:, None, None]

    @jax.jit
    def sums_and_gradient(images, cotangent):
        with_gradient, back = jax.vjp(lambda x: sum_windows(x, size), images)
        return sum_windows(images, size), with_gradient, *back(cotangent)

    with jax.enable_x64(True):
        alone, with_gradient, back = sums_and_gradient(images, cotangent)
        np.testing.assert_allclose(alone, sums, atol=1e-12)
        np.testing.assert_allclose(with_gradient, sums, atol=1e-12)
        np.testing.assert_array_equal(back, gradient)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 9, 8, 2), 2), ((2, 7, 9, 1), 3), ((1, 5, 4, 3), 1), ((2, 3, 8, 2), 4), ((1, 4, 1, 1), 2), ((3, 4, 4, 3), 4)],
)
def test_window_sums_and_their_gradient_are_those_of_a_loop(shape, size):
    assert_windows_equal_a_loop(shape, size, seed=0)


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_window_sums_of_any_shape_are_those_of_a_loop(shape, size, seed):
    assert_windows_equal_a_loop(shape, size, seed)


def test_weights_are_those_of_flax():
    images = draw(3, 7, 6, (5, 5), 2, 4, np.float32)[0]
    ours, theirs = Convolution(4, 5), nn.Conv(4, (5, 5))
    params, own = (jax.jit(layer.init)(jax.random.key(0), images) for layer in (theirs, ours))
    jax.tree.map(np.testing.assert_array_equal, params, own)
    np.testing.assert_allclose(*(jax.jit(layer.apply)(params, images) for layer in (ours, theirs)), atol=1e-5)
