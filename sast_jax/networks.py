"""Spiking networks as linen modules: one definition, any mode on the same weights, two orders of work."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sast_jax.convolution import Convolution, rows, sum_windows, sum_windows_jvp
from sast_jax.devices import to_pool
from sast_jax.errors import UserError
from sast_jax.neurons import Reset, aligned, check_neuron, lif, lif_init, readout_weights, spikes_and_remaining
from sast_jax.numeric import check_range, wide_dtype
from sast_jax.pallas import are_fast, lif_pallas
from sast_jax.randomness import make_key
from sast_jax.spikes import DERIVATIVE_RULES, DerivativeRule, Mode, SpikeFn, spike_fn

Order = Literal["auto", "layer_major", "step_major"]
Readout = Literal["leaky", "rate"]
Precision = Literal["float32", "bfloat16"]
TimeLoop = Literal["auto", "scan", "pallas"]

ORDERS: tuple[Order, ...] = ("auto", "layer_major", "step_major")
READOUTS: tuple[Readout, ...] = ("leaky", "rate")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
TIME_LOOPS: tuple[TimeLoop, ...] = ("auto", "scan", "pallas")

MAX_UNROLL = 32
"""Most steps that are unrolled of themselves, where it is not a CPU; the more, the longer it takes to compile."""


MIN_SIZE_IN_POOL = 2**17
"""Potentials from which on a loop over time should run in XLA's pool of threads: to go there takes about 0.1 ms."""


class Activity(NamedTuple):
    """How active each layer of spiking neurons is, on average over steps, batch and neurons.

    Attributes:
        spike_rates: Mean of the spikes of each layer.
        above_threshold: Share of potentials above the threshold in each layer.
    """

    spike_rates: tuple[jax.Array, ...]
    above_threshold: tuple[jax.Array, ...]


def measure_activity(spikes: Sequence[jax.Array]) -> Activity:
    """Returns the activity at each step, `[T]`, given the spikes `[T, B, ...]` of each layer."""

    def means(x):
        return jnp.mean(x, axis=tuple(range(1, x.ndim)))

    # Every family is 1/2 at the threshold, and increases.
    return Activity(tuple(map(means, spikes)), tuple(means((x > 0.5).astype(x.dtype)) for x in spikes))


class NetworkOutput(NamedTuple):
    """What a network returns. What is not used costs nothing under jit.

    Attributes:
        logits: `[B, K]`.
        spikes: Spikes of each layer, `[T, B, ...]`; in surrogate mode numbers in (0, 1).
        activity: Means of the spikes; of a long recording they can be had where all spikes do not fit in memory. `None`, as a
            network of one's own may leave it: to be measured on `spikes`.
    """

    logits: jax.Array
    spikes: tuple[jax.Array, ...]
    activity: Activity | None = None


def as_output(output: Any) -> NetworkOutput:
    """Returns what a network returned, logits alone or with spikes, as a `NetworkOutput`.

    Raises:
        TypeError: If it is neither.
    """
    if hasattr(output, "logits"):
        return output  # type: ignore[no-any-return]
    if not hasattr(output, "shape"):
        raise TypeError(f"a network must return logits [B, K] or a sast_jax.NetworkOutput; got {type(output).__name__}")
    return NetworkOutput(output, ())


class Calibration(NamedTuple):
    """What may be set for each layer of spiking neurons once the weights are frozen.

    Attributes:
        thresholds: Threshold of each layer, a number or `[C]` for each channel, in place of the network's.
        gains: Factor of each layer's spikes on their way to the next one, a number or `[C]`; the reset does not see it, and
            a chip folds it into the next layer's weights.
    """

    thresholds: tuple[jax.typing.ArrayLike, ...]
    gains: tuple[jax.typing.ArrayLike, ...]


class SpikingNetwork(nn.Module):
    """Layers of synapse and neurons, then a readout. Subclasses say what the synapses are.

    The mode is an argument of the call and never part of the weights: the same `params` serve all three modes.

    Attributes:
        num_classes: Number of classes K.
        decay: Share of the potential kept per step, in [0, 1].
        threshold: Potential above which a neuron spikes, > 0.
        reset: `zero`, `subtract` or `none`.
        family: Surrogate family, `arctan`, `logistic` or `fast_sigmoid`.
        slope: Slope of the surrogate, > 0.
        readout: `leaky`: mean potential of integrators that do not spike; `rate`: spike counts of spiking output neurons.
        readout_decay: Decay of the leaky readout, in [0, 1]; 0 is the mean of the output current.
        init_gain: Standard deviation of the initial weights times the square root of their fan-in. At 1 (LeCun) few neurons
            of a second layer reach the threshold and learning starts slowly.
        order: `layer_major` takes all T steps through one layer before the next (T * B images at once through each synapse);
            `step_major` takes all layers through one step before the next. Equal up to rounding; they differ in speed and memory.
            `auto`: `step_major` for convolutions on a CPU, else `layer_major`; see docs/results/speed.md.
        unroll: Steps per iteration of the compiled time loop, or `None` for all of them (no loop is left). 0: one on a CPU,
            elsewhere all, at most 32. Kernels have no such loop.
        precision: Of the products of weights with frames and spikes, but for a leaky readout's. In `bfloat16` they are half as
            large and, in large batches on a GPU, faster; weights, potentials, spikes and logits stay in float32.
        time_chunk: Steps after which the state of the neurons is kept for the backward pass; all between is computed again.
            Memory grows with T / time_chunk + time_chunk instead of T, for one more forward pass. 0: all is kept.
        time_loop: What takes the neurons of a layer through time: `scan`, the compiler's loop, or `pallas`, kernels for GPUs and
            TPUs (`lif_pallas`), which take whole layers and so imply the order `layer_major`. `auto`: the kernels on a GPU unless
            the order is `step_major`, and the loop elsewhere. A second derivative needs the loop.
        derivative_rule: `vjp`: straight-through spikes, convolutions and kernels define their gradients by `jax.custom_vjp`:
            fast, and for reverse mode. `jvp`: forward mode works, too (`jax.jvp`, `jacfwd`, `linearize`), with equal derivatives
            up to rounding. Weights are those of either, so a trained network becomes `network.clone(derivative_rule="jvp")`.
    """

    num_classes: int
    decay: float = 0.9
    threshold: float = 1.0
    reset: Reset = "zero"
    family: str = "arctan"
    slope: float = 2.0
    readout: Readout = "leaky"
    readout_decay: float = 0.0
    init_gain: float = 2.0
    order: Order = "auto"
    unroll: int | None = 0
    precision: Precision = "float32"
    time_chunk: int = 0
    time_loop: TimeLoop = "auto"
    derivative_rule: DerivativeRule = "vjp"

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers in order, as in the tree of weights; the last is the readout."""
        raise NotImplementedError

    @property
    def num_spiking(self) -> int:
        """Number of layers with spiking neurons: all, or all but a leaky readout."""
        return len(self.layer_names) - (self.readout == "leaky")

    def make_synapses(self) -> list[nn.Module]:
        """Returns the weights of each layer: a module from what `pool` returns, divided by `pool_area`, to current.

        That of a leaky readout must be affine: it is applied to the sum over time.
        """
        raise NotImplementedError

    def pool(self, index: int, x: jax.Array) -> jax.Array:
        """Returns what reaches the weights of a layer: sums over its pooling windows, flattened for dense weights.

        Args:
            index: Number of the layer, from 0.
            x: `[B, ...]` frames, or spikes of the layer before.
        """
        raise NotImplementedError

    def pool_area(self, index: int) -> int:
        """Returns the number of neurons in a pooling window of a layer; the mean over it is what its weights see."""
        raise NotImplementedError

    def num_neurons(self, index: int, height: int, width: int) -> int:
        """Returns the number of neurons of a spiking layer, for frames of a size."""
        raise NotImplementedError

    def current(self, index: int, x: jax.Array) -> jax.Array:
        """Returns the current `[B, ...]` of a layer from frames, or from the spikes of the layer before, `[B, ...]`."""
        x = x.astype(wide_dtype(x))
        return self.synapses[index](self.pool(index, x) / self.pool_area(index)).astype(x.dtype)

    @property
    def order_on_cpu(self) -> Order:
        """Returns the order `auto` on a CPU, where either may be the faster one."""
        return "layer_major"

    @property
    def _has_kernels(self):
        if self.derivative_rule == "jvp":
            return False
        return self.time_loop == "pallas" or (self.time_loop == "auto" and self.order != "step_major" and are_fast())

    @property
    def _order_here(self):
        if self._has_kernels:
            return "layer_major"
        if self.order != "auto":
            return self.order
        return self.order_on_cpu if jax.default_backend() == "cpu" else "layer_major"

    def _unroll_here(self, num_time_steps):
        if self.unroll is None:
            return num_time_steps
        return self.unroll or (1 if jax.default_backend() == "cpu" else min(num_time_steps, MAX_UNROLL))

    @property
    def product_dtype(self) -> Any:
        """What the synapses cast their operands to; `None`: they take them as they come."""
        return jnp.bfloat16 if self.precision == "bfloat16" else None

    def dense(self, name: str, size: int) -> nn.Module:
        """Returns the dense weights of a layer; a leaky readout's, whose input is a sum over time, stay in float32."""
        is_sum = self.readout == "leaky" and name == self.layer_names[-1]
        dtype = None if is_sum else self.product_dtype
        return nn.Dense(size, dtype=dtype, param_dtype=jnp.float32, kernel_init=self.kernel_init, name=name)

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Initializer of all weights but the biases, which start at 0."""
        return nn.initializers.variance_scaling(self.init_gain**2, "fan_in", "truncated_normal")

    def setup(self):
        """Checks the choices and the ranges of numbers, and creates the synapses."""
        check_neuron(decay=self.decay, threshold=self.threshold, reset=self.reset)
        check_range("slope", self.slope, "positive and finite")
        check_range("readout_decay", self.readout_decay, "in [0, 1]")
        check_range("init_gain", self.init_gain, "a finite number >= 0")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        if self.readout not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)}; got {self.readout!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.time_loop not in TIME_LOOPS:
            raise ValueError(f"time_loop must be one of {', '.join(TIME_LOOPS)}; got {self.time_loop!r}")
        if self.derivative_rule not in DERIVATIVE_RULES:
            raise ValueError(f"derivative_rule must be one of {', '.join(DERIVATIVE_RULES)}; got {self.derivative_rule!r}")
        is_in_loop = self._order_here == "step_major" or self.time_chunk
        if self.precision == "bfloat16" and is_in_loop and jax.default_backend() == "gpu":
            raise UserError(
                "network.precision: bfloat16 gave wrong gradients on a GPU with order step_major (jax 0.11.2), and has not been "
                "checked there with network.time_chunk; take order auto and time_chunk 0, or float32"
            )
        self.synapses = self.make_synapses()

    def __call__(
        self,
        frames: jax.Array,
        mode: Mode | Sequence[Mode | SpikeFn] = "surrogate",
        calibration: Calibration | None = None,
    ) -> NetworkOutput:
        """Applies the network.

        Args:
            frames: `[T, B, H, W, C]` event frames, of any dtype.
            mode: `surrogate`, `hard` or `straight_through`; or for each layer of spiking neurons one of them or a spike function,
                which is given a convolution's neurons by rows, `[B, H, W * C]`.
            calibration: Thresholds and gains of each layer; `None`: the network's threshold, gain 1.

        Returns:
            Logits and the spikes of each layer.

        Raises:
            ValueError: If there are not as many modes, thresholds or gains as layers of spiking neurons, a number of the network
                is out of its range, or frames have no step, sample or pixel.
        """
        if 0 in frames.shape:
            raise ValueError(f"frames must hold at least one time step, sample and pixel; got {frames.shape}")
        is_layer_major = self._order_here == "layer_major"
        run = type(self)._layer_major if is_layer_major else type(self)._step_major
        init = lif_init if is_layer_major else jnp.zeros_like
        currents, output = self._shapes(frames)
        neurons = [
            neuron | {"threshold": _in_rows(neuron["threshold"], current)}
            for neuron, current in zip(self.neurons(mode, calibration), currents, strict=True)
        ]
        gains = None if calibration is None else calibration.gains
        # Both readouts are sums over time, so that no output of a step need be kept.
        decay = jnp.asarray(self.readout_decay if self.readout == "leaky" else 0.0, output.dtype)
        weights = readout_weights(len(frames), decay)

        def run_chunk(network, carry, inputs):
            return run(network, *carry, *inputs, neurons, gains)

        states = tuple(init(jax.eval_shape(_rows_of, current)) for current in currents)
        (_, total), (spikes, activity) = self._in_chunks(run_chunk, (states, jnp.zeros_like(output)), (frames, weights))
        logits = total if self.readout == "rate" else self._leaky_readout(total, weights)
        return NetworkOutput(logits, spikes, jax.tree.map(jnp.mean, activity))

    def _leaky_readout(self, total, weights):
        """Mean over time of the readout's potentials, from the sum over time of what reaches its weights.

        They are affine in that: (W sum_t w_t x_t + b sum_t w_t) / T, with the weights of `readout_weights`.
        """
        synapse = self.synapses[-1]
        bias = synapse(jnp.zeros_like(total[:1]))
        return (synapse(total / self.pool_area(self.num_spiking)) + (weights.sum() - 1) * bias) / len(weights)

    def _to_readout(self, x):
        """What is summed over time, from the spikes of the last layer, or from frames if there is none."""
        x = x.astype(wide_dtype(x))
        return x if self.readout == "rate" else self.pool(self.num_spiking, x)

    def _shapes(self, frames):
        """Returns shape and dtype of what `_currents` does. A network of its own shows them."""
        network, key = self.clone(parent=None, name=None), make_key(0)
        shapes, _ = jax.eval_shape(functools.partial(network.init_with_output, method="_currents"), key, frames[0])
        return shapes

    def _currents(self, x):
        """Returns the current of each layer of spiking neurons, and what reaches the readout, where currents stand for spikes."""
        currents = []
        for index in range(self.num_spiking):
            x = self.current(index, x)
            currents.append(x)
        return currents, self._to_readout(x)

    def _in_chunks(self, run_chunk, carry, inputs):
        num_time_steps, chunk = len(inputs[0]), self.time_chunk
        if not chunk or chunk >= num_time_steps:
            return run_chunk(self, carry, inputs)
        # What is left over of whole chunks stands before the loop.
        run_chunk, first = nn.remat(run_chunk, prevent_cse=False), (num_time_steps - 1) % chunk + 1
        carry, head = run_chunk(self, carry, jax.tree.map(lambda x: x[:first], inputs))
        scan = nn.scan(run_chunk, variable_broadcast="params", split_rngs={"params": False})
        carry, tail = scan(self, carry, jax.tree.map(lambda x: x[first:].reshape(-1, chunk, *x.shape[1:]), inputs))
        return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[2:])]), head, tail)

    def neurons(self, mode: Mode | Sequence[Mode | SpikeFn], calibration: Calibration | None = None) -> list[dict[str, Any]]:
        """Returns the arguments of `lif_step` for each layer of spiking neurons; see `__call__`."""
        modes = [mode] * self.num_spiking if isinstance(mode, str) else list(mode)
        if len(modes) != self.num_spiking:
            raise ValueError(f"mode must be one name or {self.num_spiking}, one per layer of spiking neurons; got {mode!r}")
        thresholds = [self.threshold] * self.num_spiking if calibration is None else calibration.thresholds
        for name, values in ("thresholds", thresholds), ("gains", thresholds if calibration is None else calibration.gains):
            if len(values) != self.num_spiking:
                raise ValueError(
                    f"calibration must have {self.num_spiking} {name}, one per layer of spiking neurons; got {len(values)}"
                )
        return [
            {
                "decay": self.decay,
                "threshold": threshold,
                "reset": self.reset,
                "spike_fn": mode if callable(mode) else self._spike_fn(mode),
            }
            for mode, threshold in zip(modes, thresholds, strict=True)
        ]

    def _spike_fn(self, mode):
        return spike_fn(mode, self.family, self.slope, derivative_rule=self.derivative_rule)

    def _layer_major(self, states, total, frames, weights, neurons, gains):
        num_time_steps, batch_size = frames.shape[:2]
        run = functools.partial(lif_pallas if self._has_kernels else lif, unroll=self._unroll_here(num_time_steps))
        new_states, spikes, x = [], [], frames.reshape(-1, *frames.shape[2:])
        for index in range(self.num_spiking):
            current = self.current(index, x)
            steps = _rows_of(current).reshape(num_time_steps, *states[index].potential.shape)
            x, state = run(steps, initial_state=states[index], **neurons[index])
            new_states.append(state)
            x = x.reshape(current.shape)
            spikes.append(x.reshape(num_time_steps, batch_size, *x.shape[1:]))
            x = x if gains is None else aligned(gains[index], x.ndim) * x
        outputs = self._to_readout(x).reshape(num_time_steps, *total.shape)
        total += jnp.tensordot(weights, outputs, 1)
        return (tuple(new_states), total), (tuple(spikes), measure_activity(spikes))

    def _step_major(self, states, total, frames, weights, neurons, gains):
        # But for a gradient both a potential and what remains of it would be kept, and hard neurons alone have none.
        is_hard = [neuron["spike_fn"] is spike_fn("hard") for neuron in neurons]

        def step(network, carry, inputs):
            (states, total), (x, weight) = carry, inputs
            new_states, spikes, above = [], [], []
            for index in range(network.num_spiking):
                # Potentials can be written over those of the step before. What remains of them cannot, as long as spikes are to
                # be computed, and is copied.
                remaining = spikes_and_remaining(states[index], **neurons[index])[1] if is_hard[index] else states[index]
                current = network.current(index, x)
                potential = remaining + _rows_of(current)
                x, remaining = spikes_and_remaining(potential, **neurons[index])
                new_states.append(potential if is_hard[index] else remaining)
                x = x.reshape(current.shape)
                spikes.append(x)
                # In the words of hard spikes, so that where these are taken the compiler takes them once.
                above.append((potential - neurons[index]["threshold"] > 0).astype(x.dtype))
                x = x if gains is None else aligned(gains[index], x.ndim) * x
            # Measured here, so that spikes which nothing else needs are not kept.
            activity = Activity(tuple(map(jnp.mean, spikes)), tuple(map(jnp.mean, above)))
            return (tuple(new_states), total + weight * network._to_readout(x)), (tuple(spikes), activity)

        num_neurons = sum(state.size for state in states)
        if isinstance(num_neurons, int) and num_neurons >= MIN_SIZE_IN_POOL:  # A size may be symbolic, as in `jax.export`.
            weights = to_pool(weights)
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, unroll=self._unroll_here(len(frames)))
        return scan(self, (states, total), (frames, weights))


def _rows_of(current):
    """Returns the current of neurons with places, `[B, H, W, C]`, by rows, and that of others, `[B, N]`, as it is."""
    return rows(current) if current.ndim > 2 else current


def _in_rows(threshold, current):
    """Returns the thresholds of channels as those of rows, with all axes."""
    is_tiled = jnp.ndim(threshold) and current.ndim > 2
    return aligned(jnp.tile(threshold, current.shape[-2]) if is_tiled else threshold, max(2, current.ndim - 1))


class SpikingMLP(SpikingNetwork):
    """Fully connected spiking network.

    Attributes:
        features: Neurons of each hidden layer.
    """

    features: tuple[int, ...] = (512,)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """As `dense_0`, `dense_1`, `readout`."""
        return (*(f"dense_{i}" for i in range(len(self.features))), "readout")

    def make_synapses(self) -> list[nn.Module]:
        """Dense layers over all pixels or neurons of the layer before."""
        sizes = zip(self.layer_names, (*self.features, self.num_classes), strict=True)
        return [self.dense(name, size) for name, size in sizes]

    def pool(self, index: int, x: jax.Array) -> jax.Array:
        """No pooling: flattened."""
        return x.reshape(x.shape[0], -1)

    def pool_area(self, index: int) -> int:
        """No pooling: 1."""
        return 1

    def num_neurons(self, index: int, height: int, width: int) -> int:
        """As many as features, or classes, whatever the size."""
        return (*self.features, self.num_classes)[index]


class SpikingConvNet(SpikingNetwork):
    """Convolutional spiking network: convolution - spikes - average pooling, repeated, then a dense readout.

    Attributes:
        features: Channels of each convolution.
        kernel_size: Height and width of the kernels.
        pool_size: Height, width and stride of the average pooling; an incomplete border window is dropped.
    """

    features: tuple[int, ...] = (12, 32)
    kernel_size: int = 5
    pool_size: int = 2

    @property
    def layer_names(self) -> tuple[str, ...]:
        """As `conv_0`, `conv_1`, `readout`."""
        return (*(f"conv_{i}" for i in range(len(self.features))), "readout")

    @property
    def order_on_cpu(self) -> Order:
        """Step by step, what reaches a convolution is still in the caches."""
        return "step_major"

    def make_synapses(self) -> list[nn.Module]:
        """Convolutions, and a dense layer."""
        *names, readout = self.layer_names
        return [
            *(
                Convolution(features, self.kernel_size, self.kernel_init, self.product_dtype, self.derivative_rule, name=name)
                for name, features in zip(names, self.features, strict=True)
            ),
            self.dense(readout, self.num_classes),
        ]

    def pool(self, index: int, x: jax.Array) -> jax.Array:
        """Pools what reaches any layer but the first.

        Raises:
            ValueError: If it has no places, as frames without an axis of samples, or if pooling leaves nothing of an axis.
        """
        if x.ndim != 4:
            raise ValueError(f"frames must be [T, B, H, W, C]; got {x.ndim + 1} axes")
        if index > 0:
            height, width = x.shape[1:3]
            if not 1 <= self.pool_size <= min(height, width):
                raise ValueError(
                    f"pool_size: must be 1 or more and at most the {height} x {width} pixels that reach layer "
                    f"{self.layer_names[index]}; got {self.pool_size}"
                )
            x = (sum_windows if self.derivative_rule == "vjp" else sum_windows_jvp)(x, self.pool_size)
        return x if index < len(self.features) else x.reshape(x.shape[0], -1)

    def pool_area(self, index: int) -> int:
        """The pool size squared, 1 for the first layer."""
        return self.pool_size**2 if index > 0 else 1

    def num_neurons(self, index: int, height: int, width: int) -> int:
        """As many as features and pixels, which each pool leaves fewer of, or as classes."""
        if index == len(self.features):
            return self.num_classes
        return self.features[index] * (height // self.pool_size**index) * (width // self.pool_size**index)


NETWORKS: dict[str, type[SpikingNetwork]] = {"conv": SpikingConvNet, "mlp": SpikingMLP}
"""The networks by the name that a config calls them."""
