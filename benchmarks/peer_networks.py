"""One network in several libraries, on equal weights: the child processes of `peers.py`, each of which runs one library.

Convolution - neurons - mean pooling, repeated, or dense layers of neurons; then a dense layer whose output is averaged over
time, cross-entropy, Adam. Neurons leak by 0.9 and reset to zero. A train step is straight-through (hard spikes, the derivative
of the arctangent), as all of these libraries train; a SAST step takes two gradients on smooth spikes, with an independent batch.
What a library cannot do, or does in its own way, is said in `OWN_WAYS`.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np

from sast_jax.allocator import keep_freed_memory

DECAY, SLOPE, RHO, LEARNING_RATE, NUM_CLASSES, KERNEL, POOL = 0.9, 2.0, 0.1, 1e-3, 10, 5, 2
CORES = len(os.sched_getaffinity(0))
ON_GPU = os.environ.get("PEERS_DEVICE") == "gpu"
"""Set by the parent, for all libraries alike."""


class Workload(NamedTuple):
    """Sizes of a network and of its batches; `kernel` 0 is a dense network."""

    size: int
    features: tuple[int, ...]
    kernel: int
    num_time_steps: int
    batch_size: int

    @property
    def layers(self):
        """Shape of the weights of each layer, and the number of places at which they are applied."""
        layers, channels, size = [], 2, self.size
        for index, features in enumerate(self.features):
            if self.kernel:
                size = size if index == 0 else size // POOL
                layers.append(((self.kernel, self.kernel, channels, features), size**2))
            else:
                layers.append(((channels if index else channels * size**2, features), 1))
            channels = features
        inputs = channels * (size // POOL) ** 2 if self.kernel else channels
        return [*layers, ((inputs, NUM_CLASSES), 1)]

    def cost(self, kind):
        """The least floating-point operations and bytes of a step: weights, frames once, potentials there and back."""
        samples = self.num_time_steps * self.batch_size
        products = [2 * math.prod(shape) * places * samples for shape, places in self.layers]
        weights = 4 * sum(math.prod(shape) for shape, _ in self.layers)
        frames = 2 * self.size**2 * samples
        if kind == "infer":
            return sum(products), frames + weights
        # Forward, gradient of the weights, and but for the first layer gradient of the input; Adam reads 4 arrays, writes 3.
        potentials = 4 * samples * sum(shape[-1] * places for shape, places in self.layers[:-1])
        passes = 2 if kind == "sast" else 1
        return passes * (3 * sum(products) - products[0]), passes * (frames + 2 * potentials) + 7 * weights


WORKLOADS = {
    "conv 34x34x2 - 16 - 32, T 10, batch 32": Workload(34, (16, 32), KERNEL, 10, 32),
    "conv 34x34x2 - 16 - 32, T 50, batch 16": Workload(34, (16, 32), KERNEL, 50, 16),
    "conv 64x64x2 - 16 - 32, T 25, batch 16": Workload(64, (16, 32), KERNEL, 25, 16),
    "dense 2312 - 512 - 10, T 25, batch 128": Workload(34, (512,), 0, 25, 128),
    "conv 34x34x2 - 12 - 32, T 10, batch 32": Workload(34, (12, 32), KERNEL, 10, 32),  # The default network.
}
SMALL = {
    "conv 8x8x2 - 8 - 8, T 5, batch 4": Workload(8, (8, 8), KERNEL, 5, 4),
    "dense 128 - 8 - 10, T 5, batch 4": Workload(8, (8,), 0, 5, 4),
}
if ON_GPU:  # Which those leave all but idle.
    WORKLOADS["conv 34x34x2 - 16 - 32, T 10, batch 512"] = Workload(34, (16, 32), KERNEL, 10, 512)
    WORKLOADS["dense 2312 - 512 - 10, T 25, batch 2048"] = Workload(34, (512,), 0, 25, 2048)


def make_weights(workload):
    """Kernels `[h, w, C, F]` or `[in, out]` and biases, the same for every library."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(0, 2 / math.sqrt(math.prod(shape[:-1])), shape) for shape, _ in workload.layers]
    return [(k.astype(np.float32), np.zeros(k.shape[-1], np.float32)) for k in kernels]


def torch_layout(workload, weights):
    """Kernels and biases as one list, as PyTorch has them: `[F, C, h, w]` and `[out, in]`, pixels by channel."""
    flat = []
    for index, (kernel, bias) in enumerate(weights):
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        else:
            if workload.kernel or index == 0:
                channels = weights[index - 1][0].shape[-1] if index else 2
                side = math.isqrt(len(kernel) // channels)
                kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(len(kernel), -1)
            kernel = kernel.T
        flat += [np.ascontiguousarray(kernel), bias]
    return flat


def make_batch(workload, seed):
    """Frames `[T, B, H, W, 2]`, of 0 and 1, and labels."""
    rng = np.random.default_rng((1, seed))
    shape = (workload.num_time_steps, workload.batch_size, workload.size, workload.size, 2)
    return (rng.random(shape) < 0.15).astype(np.uint8), rng.integers(0, NUM_CLASSES, workload.batch_size)


# --- JAX ---------------------------------------------------------------------------------------------------------------------


class JaxProgram:
    """Steps made of `apply(params, frames, smooth) -> logits`."""

    def __init__(self, workload, params, apply, batches):
        """Prepares what `steps` holds; nothing is compiled yet."""
        import jax
        import optax

        from sast_jax import sam

        def loss(params, batch, smooth):
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch[0], smooth), batch[1]).mean()

        def step(tx, smooth):
            @functools.partial(jax.jit, donate_argnums=(0, 1))
            def step(params, opt_state, *batches):
                grad = jax.grad(loss)
                updates, opt_state = tx.update(
                    grad(params, batches[-1], smooth),
                    opt_state,
                    params,
                    grad_fn=lambda params: grad(params, batches[0], smooth),
                )
                return optax.apply_updates(params, updates), opt_state

            return step

        adam = optax.with_extra_args_support(optax.adam(LEARNING_RATE))
        sast = optax.chain(sam(RHO), adam)
        self.workload, self.jax, self.batches = workload, jax, [jax.device_put(batch) for batch in batches]
        self.states = {kind: self._copy(params, tx) for kind, tx in (("train", adam), ("sast", sast))}
        self.params = jax.device_put(params)
        self.functions = {"train": step(adam, False), "sast": step(sast, True)}
        self.apply = jax.jit(functools.partial(apply, smooth=False))

    def _copy(self, params, tx):
        return self.jax.jit(lambda params: (params, tx.init(params)))(params)

    def run(self, kind):
        """Takes a step."""
        if kind == "infer":
            self.result = self.logits = self.apply(self.params, self.batches[0][0])
        else:
            batches = self.batches[: 2 if kind == "sast" else 1]
            self.result = self.states[kind] = self.functions[kind](*self.states[kind], *batches)

    def wait(self):
        """Waits for the step."""
        self.jax.block_until_ready(self.result)

    def peak_memory(self):
        """Of the GPU, in bytes, since the process began."""
        return self.jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]

    def reset(self):
        """Nothing: each kind of step has weights of its own."""

    def first_gradient(self, kind):
        """The gradient of the first step, as Adam's average holds it."""
        import optax

        ((_, mean),) = optax.tree.get_all_with_path(self.states[kind][1], "mu")
        layers = [(np.asarray(kernel), np.asarray(bias)) for kernel, bias in in_order(mean)]
        return [leaf / 0.1 for leaf in torch_layout(self.workload, layers)]

    def infer(self):
        """Logits of hard spikes."""
        return np.asarray(self.logits)


def in_order(tree):
    """The layers of a tree of weights in order, as pairs of kernel and bias."""
    found = []

    def visit(tree):
        if "kernel" in tree:
            found.append((tree["kernel"], tree["bias"]))
        else:
            for key in sorted(tree, key=lambda key: (len(str(key)), str(key))):
                visit(tree[key])

    visit(tree)
    return found


def replace(tree, layers):
    """The same tree with other kernels and biases."""
    layers = iter(layers)

    def visit(tree):
        if "kernel" in tree:
            kernel, bias = next(layers)
            return {"kernel": kernel, "bias": bias}
        return {key: visit(tree[key]) for key in sorted(tree, key=lambda key: (len(str(key)), str(key)))}

    return visit(tree)


def smooth_spike(x):
    """The surrogate itself."""
    import jax.numpy as jnp

    return 0.5 + jnp.arctan(0.5 * math.pi * SLOPE * x) / math.pi


def sast_jax_program(workload, weights, batches):
    """The train step of sast_jax that users have, metrics and all, on as many devices as the command takes."""
    import optax

    from sast_jax import SpikingConvNet, SpikingMLP, sam
    from sast_jax.data import BATCH_SPECS, Batch
    from sast_jax.devices import WHOLE, make_mesh, place, split_cpu
    from sast_jax.training import init_state, make_train_step

    split_cpu()
    mesh = make_mesh(workload.batch_size) if workload.kernel else None
    if workload.kernel:
        network = SpikingConvNet(NUM_CLASSES, features=workload.features, kernel_size=workload.kernel)
    else:
        network = SpikingMLP(NUM_CLASSES, features=workload.features)
    params = {name: {"kernel": kernel, "bias": bias} for name, (kernel, bias) in zip(network.layer_names, weights, strict=True)}
    program = JaxProgram(
        workload,
        params,
        lambda params, frames, smooth: network.apply({"params": params}, frames, "surrogate" if smooth else "hard").logits,
        batches,
    )
    program.batches = [
        place(Batch(frames, labels.astype(np.int32), np.ones(len(labels), bool)), mesh, BATCH_SPECS) for frames, labels in batches
    ]
    program.params = place(params, mesh, WHOLE)

    def make(mode, tx):
        state = init_state(network, tx, batches[0][0][:, :1], seed=0, params=params)
        return place(state, mesh, WHOLE), make_train_step(network, tx, mode, mesh=mesh)

    adam = optax.adam(LEARNING_RATE)
    steps = {"train": make("straight_through", adam), "sast": make("surrogate", optax.chain(sam(RHO), adam))}
    program.states = {kind: (state.params, state.opt_state) for kind, (state, _) in steps.items()}
    states = {kind: state for kind, (state, _) in steps.items()}

    def step(kind):
        def run(params, opt_state, *batches):
            del params, opt_state  # As in `states`, which is donated.
            states[kind], _ = steps[kind][1](states[kind], *batches)
            return states[kind].params, states[kind].opt_state

        return run

    program.functions = {kind: step(kind) for kind in steps}
    return program


def spyx_program(workload, weights, batches):
    """The layers of `spyx.nn.Sequential` under `spyx.nn.run`."""
    import jax.numpy as jnp
    import spyx
    from flax import nnx

    def build(activation):
        rngs, layers, size = nnx.Rngs(0), [], workload.size
        for index, (shape, _) in enumerate(workload.layers[:-1]):
            if workload.kernel:
                if index:
                    layers.append(lambda x: nnx.avg_pool(x, (POOL, POOL), (POOL, POOL)))
                    size //= POOL
                layers.append(nnx.Conv(shape[2], shape[3], shape[:2], rngs=rngs))
                neurons = (size, size, shape[3])
            else:
                layers += [spyx.nn.Flatten()] * (index == 0) + [nnx.Linear(*shape, rngs=rngs)]
                neurons = (shape[1],)
            layers.append(spyx.nn.LIF(neurons, beta=DECAY, activation=activation, rngs=rngs))
        if workload.kernel:
            layers += [lambda x: nnx.avg_pool(x, (POOL, POOL), (POOL, POOL)), spyx.nn.Flatten()]
        return spyx.nn.Sequential(*layers, nnx.Linear(*workload.layers[-1][0], rngs=rngs))

    def is_weight(path, _):
        return path[-1] in ("kernel", "bias")

    models = [nnx.split(build(activation), is_weight, ...) for activation in (spyx.axn.arctan(SLOPE), smooth_spike)]
    params = replace(nnx.to_pure_dict(models[0][1]), weights)

    def apply(params, frames, smooth):
        definition, state, rest = models[smooth]
        state = nnx.clone(state)
        nnx.replace_by_pure_dict(state, params)
        outputs, _ = spyx.nn.run(nnx.merge(definition, state, rest), frames.astype(jnp.float32))
        return outputs.mean(0)

    return JaxProgram(workload, params, apply, batches)


def slax_program(workload, weights, batches):
    """The layers of `slax.connect` under `slax.RNN`, whose loop it unrolls."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import slax

    def pool(x):
        return nn.avg_pool(x, (POOL, POOL), (POOL, POOL))

    class Pool(nn.Module):
        @nn.compact
        def __call__(self, x):
            return pool(x)

    class Flatten(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x.reshape(x.shape[0], -1)

    def build(spike_fn):
        layers = [] if workload.kernel else [Flatten()]
        for index, (shape, _) in enumerate(workload.layers[:-1]):
            if workload.kernel:
                layers += [Pool()] * (index > 0) + [nn.Conv(shape[3], shape[:2])]
            else:
                layers += [nn.Dense(shape[1])]
            layers.append(slax.LIF(math.log(DECAY / (1 - DECAY)), spike_fn, subtraction_reset=False))
        layers += [Pool(), Flatten()] if workload.kernel else []
        return slax.RNN(slax.connect([*layers, nn.Dense(NUM_CLASSES)], return_carry=False), unroll=workload.num_time_steps)

    models = [build(slax.atan(SLOPE)), build(smooth_spike)]
    variables = models[0].init(jax.random.key(0), jnp.asarray(batches[0][0][:1], jnp.float32))
    rest = jax.tree.map(jnp.zeros_like, {key: value for key, value in variables.items() if key != "params"})

    def apply(params, frames, smooth):
        outputs, _ = nn.Module.apply(models[smooth], {"params": params, **rest}, frames.astype(jnp.float32), mutable=["carry"])
        return outputs.mean(0)

    return JaxProgram(workload, replace(variables["params"], weights), apply, batches)


# --- PyTorch -----------------------------------------------------------------------------------------------------------------


def torch_program(make_neuron, *, compiled=None, multi_step=False, smooth_too=True, weight_scale=1.0):
    """A function that makes the program of a library whose neuron is `(current, state) -> (spikes, state)`.

    `make_neuron(smooth)` makes the neurons of a layer; those of `multi_step` take all steps `[T, B, ...]` at once. `compiled` is
    the mode of `torch.compile`.
    """

    def make(workload, weights, batches):
        import torch

        torch.set_num_threads(CORES)
        torch.set_float32_matmul_precision("high" if ON_GPU else "highest")  # TF32, as XLA takes it.
        torch.backends.cudnn.benchmark = True
        functional, is_conv = torch.nn.functional, bool(workload.kernel)
        # norse takes a part of the current; its weights make up for it.
        scales = [weight_scale] * (len(weights) - 1) + [1.0]
        layers = [(scale * kernel, scale * bias) for scale, (kernel, bias) in zip(scales, weights, strict=True)]
        with torch.device("cuda" if ON_GPU else "cpu"):
            params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for x in torch_layout(workload, layers)]
            neurons = {smooth: [make_neuron(smooth) for _ in weights[:-1]] for smooth in (False, True)[: 1 + smooth_too]}

        def synapse(index, x):
            kernel, bias = params[2 * index : 2 * index + 2]
            if is_conv and index:
                x = functional.avg_pool2d(x, POOL)
            return (
                functional.conv2d(x, kernel, bias, padding="same")
                if kernel.ndim == 4
                else functional.linear(x.flatten(1), kernel, bias)
            )

        def forward(frames, smooth):
            x = frames.float()
            if multi_step:
                for index in range(len(weights)):
                    current = synapse(index, x.flatten(0, 1))
                    x = current.unflatten(0, frames.shape[:2])
                    if index < len(weights) - 1:
                        x, _ = neurons[smooth][index](x, None)
                return x.mean(0)
            total, states = 0.0, [None] * (len(weights) - 1)
            for x in frames.float():
                for index in range(len(weights) - 1):
                    x, states[index] = neurons[smooth][index](synapse(index, x), states[index])
                total = total + synapse(len(weights) - 1, x)
            return total / len(frames)

        def loss(frames, labels, smooth):
            return functional.cross_entropy(forward(frames, smooth), labels)

        if compiled:
            forward, loss = torch.compile(forward, mode=compiled), torch.compile(loss, mode=compiled)
        return TorchProgram(params, forward, loss, batches, np.repeat(scales, 2))

    return make


class TorchProgram:
    """Steps made of a network and its loss."""

    def __init__(self, params, forward, loss, batches, scales):
        """Puts the batches into PyTorch's order, once."""
        import torch

        self.torch, self.params, self.forward, self.loss, self.scales = torch, params, forward, loss, scales
        self.adam, self.first_params = torch.optim.Adam(params, LEARNING_RATE), [p.detach().clone() for p in params]
        device = params[0].device
        self.batches = [
            (
                torch.tensor(np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3)), device=device),
                torch.tensor(labels, device=device),
            )
            for frames, labels in batches
        ]

    def run(self, kind):
        """Takes a step."""
        torch = self.torch
        if kind == "infer":
            with torch.no_grad():
                self.logits = self.forward(self.batches[0][0], False)
            return
        self.adam.zero_grad()
        if kind == "sast":
            self.loss(*self.batches[1], True).backward()
            with torch.no_grad():
                grads = [p.grad for p in self.params]
                scale = RHO / torch.clamp(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))), min=1e-38)
                steps = torch._foreach_mul(grads, scale)
                torch._foreach_add_(self.params, steps)
            self.adam.zero_grad()
            self.loss(*self.batches[0], True).backward()
            with torch.no_grad():
                torch._foreach_sub_(self.params, steps)
        else:
            self.loss(*self.batches[0], False).backward()
        self.adam.step()

    def wait(self):
        """Waits for the step."""
        if ON_GPU:
            self.torch.cuda.synchronize()

    def peak_memory(self):
        """Of the GPU, in bytes, since the process began."""
        return self.torch.cuda.max_memory_allocated()

    def reset(self):
        """Goes back to the first weights."""
        with self.torch.no_grad():
            self.torch._foreach_copy_(self.params, self.first_params)
        self.adam.state.clear()

    def first_gradient(self, kind):
        """The gradient of the step just taken."""
        return [scale * p.grad.cpu().numpy() for scale, p in zip(self.scales, self.params, strict=True)]

    def infer(self):
        """Logits of hard spikes."""
        return self.logits.cpu().numpy()


def plain_neuron(smooth):
    """The equations in PyTorch."""
    import torch

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x > 0).float()

        @staticmethod
        def backward(ctx, cotangent):
            (x,) = ctx.saved_tensors
            return cotangent * (0.5 * SLOPE / (1 + (0.5 * math.pi * SLOPE * x) ** 2))

    spike = torch_smooth_spike if smooth else StraightThrough.apply

    def neuron(current, state):
        potential = current if state is None else DECAY * state[0] * (1 - state[1]) + current
        spikes = spike(potential - 1)
        return spikes, (potential, spikes)

    return neuron


def torch_smooth_spike(x):
    """The surrogate itself."""
    import torch

    return 0.5 + torch.atan(0.5 * math.pi * SLOPE * x) / math.pi


def snntorch_neuron(smooth):
    """The neuron `Leaky` of snnTorch."""
    import snntorch

    spike = torch_smooth_spike if smooth else snntorch.surrogate.atan(SLOPE)
    leaky = snntorch.Leaky(beta=DECAY, spike_grad=spike, reset_mechanism="zero")

    def neuron(current, state):
        import torch

        return leaky(current, torch.zeros_like(current) if state is None else state)

    return neuron


def spikingjelly_neuron(smooth):
    """SpikingJelly's `LIFNode`, all steps at once."""
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(
        tau=1 / (1 - DECAY), decay_input=False, surrogate_function=surrogate.ATan(SLOPE, spiking=not smooth), step_mode="m"
    )

    def run(current, state):
        del state
        node.reset()
        return node(current), None

    return run


def norse_neuron(smooth):
    """The neuron `LIFBoxCell` of norse; it takes a tenth of the current per step."""
    del smooth
    import norse.torch
    import torch

    return norse.torch.LIFBoxCell(norse.torch.LIFBoxParameters(tau_mem_inv=torch.tensor(1 - DECAY), method="super"), dt=1.0)


# --- The machine -------------------------------------------------------------------------------------------------------------


SIDE, COPIED = (8192, 2**31) if ON_GPU else (2048, 3 * 2**24)  # What the allocator keeps: else it would measure page faults.
MACHINE = {"matmul": 2 * SIDE**3, "copy": 2 * COPIED}
"""What the machine is timed at: operations of a product of matrices, and bytes that a copy reads and writes."""


class Machine:
    """What the floor is made of: a product of matrices and a copy."""

    def __init__(self):
        """Allocates."""
        import jax

        self.jax = jax
        matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
        array = jax.numpy.zeros(COPIED // 4)
        self.functions = {
            "matmul": functools.partial(jax.jit(lambda a: a @ a), matrix),
            "copy": functools.partial(jax.jit(lambda x: x + 1), array),
        }

    def reset(self):
        """Nothing is ever changed."""

    def run(self, kind):
        """Does one of both."""
        self.result = self.functions[kind]()

    def wait(self):
        """Waits for it."""
        self.jax.block_until_ready(self.result)


LIBRARIES = {
    "sast_jax": (sast_jax_program, "sast_jax"),
    "plain PyTorch": (torch_program(plain_neuron), "torch"),
    "plain PyTorch, torch.compile": (torch_program(plain_neuron, compiled="default"), "torch"),
    "SpikingJelly": (torch_program(spikingjelly_neuron, multi_step=True), "spikingjelly"),
    "snnTorch": (torch_program(snntorch_neuron), "snntorch"),
    "norse": (torch_program(norse_neuron, smooth_too=False, weight_scale=1 / (1 - DECAY)), "norse"),
    "slax": (slax_program, "slax"),
    "spyx": (spyx_program, "spyx"),
}
"""How each row's program is made, and the package it needs."""
if ON_GPU:
    LIBRARIES["torch.compile, CUDA graphs"] = torch_program(plain_neuron, compiled="reduce-overhead"), "torch"

OWN_WAYS = {
    "snnTorch": "its reset is detached from the gradient",
    "norse": "its own surrogate (SuperSpike); it has no smooth spikes",
    "spyx": "its neuron subtracts the threshold and spikes one step late",
}
"""Why a library's spikes or gradients are not those of the others."""


def peak_memory(program, kind):
    """The largest memory, in bytes, while it takes two steps."""
    if ON_GPU:
        return program.peak_memory()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(2):
        program.run(kind)
        program.wait()
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def answer(program, command, kind, argument):
    """Does what the parent asks for."""
    start = time.perf_counter()
    if command == "compile":
        program.reset()
        program.run(kind)
        program.wait()
        seconds = time.perf_counter() - start
        if kind not in MACHINE:
            np.savez(argument, *([program.infer()] if kind == "infer" else program.first_gradient(kind)))
        return seconds
    if command == "warm_up":
        while time.perf_counter() - start < float(argument):
            program.run(kind)
            program.wait()
        return None
    if command == "memory":
        return peak_memory(program, kind)
    program.run(kind)  # Other processes had the caches.
    program.wait()
    start = time.perf_counter()
    for _ in range(int(argument)):
        program.run(kind)
        if not ON_GPU:  # Which is kept busy by several steps under way, as in training.
            program.wait()
    program.wait()
    return (time.perf_counter() - start) / int(argument)


def main():
    """Builds the program, then answers one JSON line for each line `command kind argument` of the parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("workload")
    args = parser.parse_args()
    keep_freed_memory()
    out = os.fdopen(os.dup(1), "w", buffering=1)  # Libraries print, too.
    os.dup2(2, 1)
    try:
        if args.library == "floor":
            program = Machine()
        else:
            workload = (WORKLOADS | SMALL)[args.workload]
            batches = make_batch(workload, 0), make_batch(workload, 1)
            program = LIBRARIES[args.library][0](workload, make_weights(workload), batches)
        print(json.dumps("ready"), file=out)
        for line in sys.stdin:
            print(json.dumps(answer(program, *line.split())), file=out)
    except Exception as error:  # Whatever a library does, the others are still measured.
        print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}), file=out)
        raise


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
