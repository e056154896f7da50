"""Random weights of a network without compiling it."""

import numpy as np

from sast_jax import SpikingConvNet


def kernel_shapes(network, shape):
    """Shapes of the kernels of a network's layers for frames `[H, W, C]`."""
    shapes = []
    for features in network.features:
        if isinstance(network, SpikingConvNet):
            height, width, channels = shape
            shapes.append((network.kernel_size, network.kernel_size, channels, features))
            shape = (height // network.pool_size, width // network.pool_size, features)
        else:
            shapes.append((int(np.prod(shape)), features))
            shape = (features,)
    return [*shapes, (int(np.prod(shape)), network.num_classes)]


def random_params(network, shape, *, seed=0, gain=None, bias=0.0):
    """Normal weights of deviation `gain / sqrt(fan-in)`, by default of the network's own gain, for frames `[H, W, C]`."""
    rng = np.random.default_rng(seed)
    gain = network.init_gain if gain is None else gain
    return {
        name: {
            "kernel": np.float32(rng.normal(0, gain / np.sqrt(np.prod(each[:-1])), each)),
            "bias": np.float32(rng.normal(0, bias, each[-1])),
        }
        for name, each in zip(network.layer_names, kernel_shapes(network, shape), strict=True)
    }
