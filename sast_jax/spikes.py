r"""Spike functions: the smooth surrogates, the step function and the three ways to combine them.

A surrogate is a smooth, increasing :math:`\sigma_k : \mathbb{R} \to (0, 1)` with :math:`\sigma_k(0) = 1/2` and slope
parameter :math:`k`; :math:`k \to \infty` gives the step function. Its argument is always the potential minus the threshold.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sast_jax.numeric import check_range

Mode = Literal["surrogate", "hard", "straight_through"]
SpikeFn = Callable[[jax.Array], jax.Array]

MODES: tuple[Mode, ...] = ("surrogate", "hard", "straight_through")

DerivativeRule = Literal["vjp", "jvp"]

DERIVATIVE_RULES: tuple[DerivativeRule, ...] = ("vjp", "jvp")
"""How jax is told a derivative: by `jax.custom_vjp`, for reverse mode; by `jax.custom_jvp`, for forward and reverse mode."""


class SurrogateFamily(NamedTuple):
    r"""A family of surrogates :math:`\sigma_k`, each member given by its slope :math:`k > 0`.

    Attributes:
        value: `(x, slope) -> sigma(x)`, element-wise.
        derivative: `(x, slope) -> sigma'(x)`, element-wise.
        max_derivative: `slope -> L1`, with :math:`L_1 = \sup_x |\sigma'(x)|`, reached at 0.
        max_second_derivative: `slope -> L2`, with :math:`L_2 = \sup_x |\sigma''(x)|`, the Lipschitz constant of
            :math:`\sigma'` (the fast sigmoid has no second derivative at 0 itself).
    """

    value: Callable[[jax.Array, float | jax.Array], jax.Array]
    derivative: Callable[[jax.Array, float | jax.Array], jax.Array]
    max_derivative: Callable[[float], float]
    max_second_derivative: Callable[[float], float]


def _in_float32_at_least(function):
    """In half precision a surrogate loses the digits that its derivative is made of, or overflows."""

    @functools.wraps(function)
    def wrapped(x, slope):
        dtype = jnp.result_type(x)
        is_half = dtype in (jnp.float16, jnp.bfloat16)
        return function(jnp.asarray(x, jnp.float32), slope).astype(dtype) if is_half else function(x, slope)

    return wrapped


@_in_float32_at_least
def arctan(x: jax.Array, slope: float | jax.Array) -> jax.Array:
    r"""Arctangent surrogate, :math:`\sigma(x) = 1/2 + \arctan(\tfrac{\pi}{2} k x) / \pi`.

    References:
        Fang, Yu, Chen, Masquelier, Huang, Tian. Incorporating Learnable Membrane Time Constant to Enhance Learning of
        Spiking Neural Networks. ICCV 2021.
    """
    return 0.5 + _fast_arctan(0.5 * math.pi * slope * x) / math.pi


@jax.custom_jvp
def _fast_arctan(x):
    """Arctangent in float32 to 5e-7: `jnp.arctan` is not vectorised on a CPU, where it would lead the cost of a neuron.

    On [0, 1] arctan is close (2e-7) to an odd rational function; elsewhere it follows from the arctangent of 1 / x.
    Written as n / d, numerators and denominators meet in one division at the end. Its place matters: XLA repeats whatever is
    cheaper than a division in everything that reads the result.
    """
    if jnp.result_type(x) == jnp.float64:
        return jnp.arctan(x)
    wide = jnp.asarray(x, jnp.float32)
    size = jnp.minimum(jnp.abs(wide), 1e7)
    n, d = jnp.minimum(size, 1), jnp.maximum(size, 1)
    n2, d2 = n * n, d * d
    numerator = n * ((0.0405515874 * n2 + 0.6559057 * d2) * n2 + 0.999997525 * d2 * d2)
    denominator = d * ((0.170822768 * n2 + 0.989170068 * d2) * n2 + d2 * d2)
    value = numerator / denominator
    return jnp.copysign(jnp.where(size > 1, math.pi / 2 - value, value), wide).astype(jnp.result_type(x))


@_fast_arctan.defjvp
def _fast_arctan_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _fast_arctan(x), tangent / (1 + jnp.square(x))


@_in_float32_at_least
def logistic(x: jax.Array, slope: float | jax.Array) -> jax.Array:
    r"""Logistic surrogate, :math:`\sigma(x) = 1 / (1 + e^{-k x})`."""
    return jax.nn.sigmoid(slope * x)


@_in_float32_at_least
def fast_sigmoid(x: jax.Array, slope: float | jax.Array) -> jax.Array:
    r"""Fast sigmoid surrogate, :math:`\sigma(x) = \tfrac12 \bigl(1 + k x / (1 + k |x|)\bigr)`.

    References:
        Zenke, Ganguli. SuperSpike: Supervised Learning in Multilayer Spiking Neural Networks. Neural Computation 2018.
    """
    return 0.5 * (1.0 + _softsign(slope * x))


@jax.custom_jvp
def _softsign(x):
    """The quotient x / (1 + |x|), its derivative in closed form: as a difference of two it would cancel far from 0."""
    limit = jnp.finfo(jnp.result_type(x, jnp.float32)).max  # Infinity over infinity would be no number.
    x = jnp.clip(x, -limit, limit)
    return x / (1.0 + jnp.abs(x))


@_softsign.defjvp
def _softsign_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _softsign(x), tangent / jnp.square(1.0 + jnp.abs(x))


FAMILIES: dict[str, SurrogateFamily] = {
    "arctan": SurrogateFamily(
        value=arctan,
        derivative=_in_float32_at_least(lambda x, slope: 0.5 * slope / (1.0 + jnp.square(0.5 * math.pi * slope * x))),
        max_derivative=lambda slope: slope / 2,
        max_second_derivative=lambda slope: 3 * math.sqrt(3) * math.pi * slope**2 / 32,
    ),
    "logistic": SurrogateFamily(
        value=logistic,
        derivative=_in_float32_at_least(lambda x, slope: slope * jax.nn.sigmoid(slope * x) * jax.nn.sigmoid(-slope * x)),
        max_derivative=lambda slope: slope / 4,
        max_second_derivative=lambda slope: slope**2 / (6 * math.sqrt(3)),
    ),
    "fast_sigmoid": SurrogateFamily(
        value=fast_sigmoid,
        derivative=_in_float32_at_least(lambda x, slope: 0.5 * slope / jnp.square(1.0 + slope * jnp.abs(x))),
        max_derivative=lambda slope: slope / 2,
        max_second_derivative=lambda slope: slope**2,
    ),
}


def _step_function(x):
    return jnp.greater(x, 0).astype(jnp.result_type(x))


def _step_function_as_surrogate(x, slope, family):
    del slope, family
    return _step_function(x)


_heaviside_jvp = jax.custom_jvp(_step_function_as_surrogate, nondiff_argnums=(2,))
"""`heaviside` for forward and reverse mode."""


@_heaviside_jvp.defjvp
def _heaviside_jvp_rule(family, primals, tangents):
    x, slope = primals
    return _heaviside_jvp(x, slope, family), (tangents[0] * FAMILIES[family].derivative(x, slope)).astype(jnp.result_type(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def heaviside(x: jax.Array, slope: float | jax.Array, family: str) -> jax.Array:
    r"""Step function whose derivative is replaced by a surrogate's: the straight-through spike.

    .. math:: H(x) = 1 \text{ if } x > 0 \text{ else } 0, \qquad \partial H / \partial x := \sigma_k'(x)

    The inequality is strict: a potential that only reaches the threshold does not spike.

    Args:
        x: Potential minus threshold, any shape.
        slope: Slope :math:`k` of the surrogate; it receives a zero gradient.
        family: A key of `FAMILIES`.

    Returns:
        0 or 1 in the dtype of `x`.

    References:
        Neftci, Mostafa, Zenke. Surrogate Gradient Learning in Spiking Neural Networks. IEEE SPM 2019.
    """
    del slope, family
    return _step_function(x)


def _heaviside_fwd(x, slope, family):
    # With the other rule, so that a second derivative can be taken in either mode.
    return _heaviside_jvp(x, slope, family), (x, slope)


def _heaviside_bwd(family, residuals, cotangent):
    x, slope = residuals
    return (cotangent * FAMILIES[family].derivative(x, slope)).astype(jnp.result_type(x)), jnp.zeros_like(slope)


heaviside.defvjp(_heaviside_fwd, _heaviside_bwd)


def spike_fn(
    mode: Mode, family: str = "arctan", slope: float | jax.Array = 2.0, *, derivative_rule: DerivativeRule = "vjp"
) -> SpikeFn:
    r"""Returns the function from potential minus threshold to spikes.

    ==================  ===================  ====================  ==================================================
    mode                value                derivative            used for
    ==================  ===================  ====================  ==================================================
    `surrogate`         :math:`\sigma_k(x)`  :math:`\sigma_k'(x)`  training; the gradient is exact
    `hard`              :math:`H(x)`         0                     deployment
    `straight_through`  :math:`H(x)`         :math:`\sigma_k'(x)`  the usual practice; the gradient is not that of `H`
    ==================  ===================  ====================  ==================================================

    Args:
        mode: `surrogate`, `hard` or `straight_through`.
        family: `arctan`, `logistic` or `fast_sigmoid`; not used in hard mode.
        slope: Slope :math:`k > 0`; not used in hard mode.
        derivative_rule: How the derivative of `straight_through` is defined; its values are equal. `vjp`: by `jax.custom_vjp`,
            for reverse mode (`grad`, `jacrev`), and forward mode over it (`hessian`). `jvp`: by `jax.custom_jvp`, for forward
            mode alone, too (`jvp`, `jacfwd`, `linearize`), where jax would say "can't apply forward-mode autodiff".

    Returns:
        An element-wise function that keeps shape and dtype.

    Raises:
        ValueError: If `mode`, `family` or `derivative_rule` is unknown, or a concrete `slope` is not positive and finite.

    Example:
        >>> float(spike_fn("surrogate", "arctan", 2.0)(jnp.array(0.0)))
        0.5
        >>> float(spike_fn("hard")(jnp.array(0.0)))
        0.0
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if derivative_rule not in DERIVATIVE_RULES:
        raise ValueError(f"derivative_rule must be one of {', '.join(DERIVATIVE_RULES)}; got {derivative_rule!r}")
    check_range("slope", slope, "positive and finite")
    if mode == "surrogate":
        return lambda x: FAMILIES[family].value(x, slope).astype(jnp.result_type(x))
    if mode == "hard":
        return _step_function
    if derivative_rule == "jvp":
        return functools.partial(_heaviside_jvp, slope=slope, family=family)
    return functools.partial(heaviside, slope=slope, family=family)


def mixed_spike_fn(is_hard: Callable[[jax.Array], jax.Array], family: str = "arctan", slope: float | jax.Array = 2.0) -> SpikeFn:
    r"""Returns a spike function for training that is hard for some neurons and smooth for the others.

    .. math:: s = m\, H(x) + (1 - m)\, \sigma_k(x), \qquad \partial s / \partial x := \sigma_k'(x)

    With :math:`m` drawn at random for every neuron this is the forward pass of adaptive smoothing gradient learning; with one
    :math:`m` for all it switches from `surrogate` to `straight_through` without a second compilation.

    Args:
        is_hard: Function from the potential minus threshold to :math:`m`, booleans that broadcast to its shape.
        family: Surrogate family.
        slope: Slope :math:`k > 0`; may be traced.

    Returns:
        An element-wise function that keeps shape and dtype.

    Example:
        >>> x = jnp.array([-1.0, 1.0])
        >>> print(mixed_spike_fn(lambda x: x > 0, "arctan", 2.0)(x).round(3))
        [0.098 1.   ]

    References:
        Wang, Jiang, Lian, Yan, Tang. Adaptive Smoothing Gradient Learning for Spiking Neural Networks. ICML 2023.
    """
    smooth, hard = spike_fn("surrogate", family, slope), spike_fn("straight_through", family, slope)
    return lambda x: jnp.where(is_hard(x), hard(x), smooth(x))
