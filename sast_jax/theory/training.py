"""What the theory says of training: curvature, the first order of SAM, convergence, and how weight and input gradients relate."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.flatten_util import ravel_pytree


def hessian_extremes(
    loss_fn: Callable[..., jax.Array], params: Any, *data: Any, seed: int = 0, tolerance: float = 1e-3
) -> tuple[float, float]:
    r"""Measures the smallest and the largest eigenvalue of a loss's Hessian by Lanczos on Hessian-vector products: an estimate.

    Ritz values lie within the spectrum, so curvature is never overstated: the largest size of the two is a lower bound of the
    smoothness constant at this point, and close to it.

    Args:
        loss_fn: Twice differentiable function `(params, *data) -> loss`; on a GPU a network is, with `time_loop="scan"`.
        params: Weights, at least three.
        data: What else it takes.
        seed: Seed of the first vector.
        tolerance: Relative accuracy.

    Returns:
        Smallest and largest eigenvalue.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    flat, unravel = ravel_pytree(params)

    def matvec(v):
        return np.asarray(_hessian_product(loss_fn, unravel, flat, jnp.asarray(v.ravel(), flat.dtype), *data), float)

    operator = LinearOperator((flat.size, flat.size), matvec=matvec, dtype=float)
    start = np.random.default_rng(seed).normal(size=flat.size)
    low, high = np.sort(eigsh(operator, k=2, which="BE", v0=start, tol=tolerance, return_eigenvectors=False))
    return float(low), float(high)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hessian_product(loss_fn, unravel, flat, vector, *data):
    return jax.jvp(jax.grad(lambda w: loss_fn(unravel(w), *data)), (flat,), (vector,))[1]


def sam_sandwich(loss: float, gradient_norm: float, rho: float, smoothness: float) -> tuple[float, float]:
    r"""Returns bounds of the loss at SAM's perturbed weights and of its maximum over the ball: proved (Lemma 7).

    .. math:: F + \rho \|g\| - \tfrac12 L \rho^2 \le F(w + \rho\, g / \|g\|) \le \max_{\|e\| \le \rho} F(w + e)
              \le F + \rho \|g\| + \tfrac12 L \rho^2

    Args:
        loss: :math:`F(w)`.
        gradient_norm: :math:`\|g\|`, of the exact gradient of F.
        rho: :math:`\rho \ge 0`.
        smoothness: :math:`L`, a Lipschitz constant of the gradient over the ball of radius :math:`\rho` around w. With a
            measured one the bounds are estimates.

    Raises:
        ValueError: If an argument other than the loss is negative.
    """
    _require(gradient_norm=gradient_norm, rho=rho, smoothness=smoothness)
    return loss + rho * gradient_norm - smoothness * rho**2 / 2, loss + rho * gradient_norm + smoothness * rho**2 / 2


def _require(**values):
    for name, value in values.items():
        if not np.all((np.asarray(value) >= 0) & np.isfinite(value)):
            raise ValueError(f"{name} must be finite and at least 0; got {value!r}")


def convergence_bound(
    num_steps: npt.ArrayLike,
    *,
    loss_gap: float,
    smoothness: float,
    variance: float,
    batch_size: int,
    learning_rate: npt.ArrayLike,
    rho: npt.ArrayLike,
) -> np.ndarray:
    r"""Bounds the mean squared gradient norm of SGD with SAM and an independent perturbation batch: proved (Theorem 8).

    .. math:: \frac1K \sum_{k < K} \mathbb{E} \|\nabla F(w_k)\|^2 \le
              \frac{2 (F(w_0) - F^*)}{\eta K} + L^2 \rho^2 + \frac{L \eta \sigma^2}{b}

    Assumed: F is L-smooth where the steps go; perturbations have length at most :math:`\rho` (normalised SAM); descent batches
    are drawn anew at each step, uniformly, with or without repetition, independently of the perturbation batch and of the past;
    the step is the plain gradient. Two shuffled streams over a finite set are independent of each other at each step, but not of
    the past within an epoch, so they are not covered; nor are momentum and Adam.

    Args:
        num_steps: K.
        loss_gap: :math:`F(w_0) - F^*`.
        smoothness: L.
        variance: :math:`\sigma^2`, at any w at least the mean squared distance of a sample's gradient from
            :math:`\nabla F(w)`.
        batch_size: b, of the descent batch.
        learning_rate: :math:`\eta \le 1 / L`.
        rho: Radius.

    Raises:
        ValueError: If :math:`\eta > 1 / L`, or a number is out of its range.
    """
    _require(loss_gap=loss_gap, smoothness=smoothness, variance=variance, learning_rate=learning_rate, rho=rho)
    if np.any(np.asarray(num_steps) < 1) or batch_size < 1:
        raise ValueError(f"num_steps and batch_size must be at least 1; got {num_steps!r} and {batch_size!r}")
    if np.any(np.asarray(learning_rate) * smoothness > 1 + 1e-9) or np.any(np.asarray(learning_rate) == 0):
        raise ValueError(
            f"the theorem assumes 0 < learning_rate <= 1 / smoothness, {1 / smoothness if smoothness else math.inf:.4g}; "
            f"got {learning_rate!r}"
        )
    eta, rho = np.asarray(learning_rate, float), np.asarray(rho, float)
    return 2 * loss_gap / (eta * np.asarray(num_steps)) + (smoothness * rho) ** 2 + smoothness * eta * variance / batch_size


def mechanism_factor(input_jacobian: npt.ArrayLike, weight_jacobian: npt.ArrayLike) -> tuple[float, float]:
    r"""Returns two factors between a sample's gradients, for every loss of the logits: proved (Lemma 9).

    .. math:: \|\nabla_x \ell\| \le c\, \|\nabla_w \ell\|, \qquad
              c = \max_v \frac{\|J_x^\top v\|}{\|J_w^\top v\|} \le \frac{s_{max}(J_x)}{s_{min}(J_w^\top)}

    So small weight gradients, which SAM seeks, come with small input gradients, sample by sample. The first factor is the best.

    Args:
        input_jacobian: :math:`J_x`, `[K, number of inputs]`, of the logits of one sample.
        weight_jacobian: :math:`J_w`, `[K, number of weights]`.

    Raises:
        ValueError: If the rows of :math:`J_w` are linearly dependent: then no factor is finite.
    """
    from scipy.linalg import eigh

    x, w = (np.asarray(j, float) for j in (input_jacobian, weight_jacobian))
    gram_x, gram_w = x @ x.T, w @ w.T
    smallest = np.linalg.eigvalsh(gram_w)[0]
    if smallest <= np.finfo(float).eps * len(gram_w) * np.trace(gram_w):
        raise ValueError("the mechanism bound assumes that the logits' weight gradients are linearly independent; they are not")
    largest = np.linalg.eigvalsh(gram_x)[-1]
    return math.sqrt(max(0.0, eigh(gram_x, gram_w, eigvals_only=True)[-1])), math.sqrt(largest / smallest)
