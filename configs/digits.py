"""Convolutional network on simulated recordings of handwritten digits: trained anywhere, offline, in minutes.

    sast-jax train --config=configs/digits.py --workdir=runs/digits

Cost: baseline 32 s and SAST 59 s on two CPU cores. Test accuracy with hard spikes, mean of seeds 0 to 2 and its standard error:
baseline 88.1 ± 0.6 %, SAST 88.6 ± 1.0 %, straight-through 93.3 ± 0.4 %; transfer gap 3.7 ± 0.8, 2.6 ± 1.1 and -16.8 ± 3.1 points
(benchmarks/results/transfer_gap_digits.md).
"""

import ml_collections

VARIANTS = ("baseline", "sast", "cheap_sast", "straight_through")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config of a variant; without one, of the pair of baseline and SAST."""
    if variant not in ("", *VARIANTS):
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, or none for the pair; got {variant!r}")
    config = ml_collections.ConfigDict()
    if not variant:
        config.variants = ("baseline", "sast")  # What is trained side by side, each in a folder of its own.

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "digits"  # digits, gestures: simulated, always at hand; nmnist, dvs_gesture: recordings in a folder.
    config.dataset.root = ""  # That folder; empty: NMNIST or DVSGesture in $SAST_JAX_DATA.
    config.dataset.download = False  # Whether tonic may download recordings into dataset.root.
    config.dataset.num_time_steps = 10  # Frames T per recording, of 30 ms each.
    config.dataset.duration = 0.0  # Seconds from the first event (dvs_gesture); 0: all of a recording.
    config.dataset.downsample = 1  # Side of the squares of pixels counted together; 2: 34 pixels become 17.
    config.dataset.binary = True  # Frames say that there was an event, not how many.
    config.dataset.num_validation = 180  # Drawn from the training part, classes in proportion or whole persons, for all choices.
    config.dataset.num_test = 360  # Drawn likewise; 0 where the data set brings its own test part. 1,257 digits are left.
    config.dataset.skip_bad = False  # Whether files that cannot be read are left out and counted, instead of refused.
    config.dataset.images = ""  # Folder of MNIST's files whose images digits shows instead; dataset.num_test is then 0.
    config.dataset.image_range = ()  # First of the training images and one past the last, as (1000, 60000); (): all.
    config.dataset.fold = ()  # Part (k, n) of n that is tested in cross-validation; (): the test part.
    config.dataset.seed = 0  # Of the simulation and of the split; not of the run.

    config.augmentation = ml_collections.ConfigDict()  # Of training batches; none here. Nothing is ever mirrored.
    config.augmentation.max_shift = 0  # Pixels, along each axis, that a recording is shifted by at most.
    config.augmentation.time_jitter = 0.0  # Probability of a pixel's count in a frame to move to the frame before or after it.
    config.augmentation.drop = 0.0  # Probability of a pixel's count in a frame to be lost.

    config.network = ml_collections.ConfigDict()
    config.network.kind = "conv"  # conv: convolution - spikes - pooling, repeated; mlp: dense layers.
    config.network.features = (8, 16)  # Channels of each convolution, or neurons of each dense layer.
    config.network.kernel_size = 3  # Height and width of the kernels (conv).
    config.network.pool_size = 2  # Height, width and stride of the average pooling (conv).
    config.network.decay = 0.9  # Share of the potential kept per step.
    config.network.threshold = 1.0  # Potential above which a neuron spikes.
    config.network.reset = "zero"  # After a spike; zero is the papers' form, subtract and none the others.
    config.network.family = "arctan"  # Smooth spikes: arctan, logistic, fast_sigmoid.
    config.network.slope = 2.0  # Of the smooth spikes; the steeper, the closer to hard ones and the smaller the gap.
    config.network.readout = "leaky"  # leaky: mean potential of outputs that do not spike; rate: their spike counts.
    config.network.readout_decay = 0.0  # Of the leaky readout; 0: mean of the output current; near 1 early outputs count more.
    config.network.init_gain = 4.0  # Initial weights are this much larger than LeCun's; at 1 or 2 SAST starts learning late.
    config.network.precision = "float32"  # Of the products with weights; bfloat16: for GPUs and TPUs, slow on CPUs.
    config.network.time_chunk = 0  # Steps between states kept for the gradient, to save memory in long recordings; 0: all kept.
    config.network.time_loop = "auto"  # pallas: kernels for GPUs and TPUs; scan: the compiler's loop; auto: pallas on GPUs.

    config.certified = ml_collections.ConfigDict()
    config.certified.margin = 0.0  # Above 0: excitation is capped so that each layer contracts by 1 - margin a step; 0: free.

    config.mode = "surrogate"  # Forward pass of training: smooth spikes, or straight_through (hard, smooth derivative).
    config.spikes = ml_collections.ConfigDict()
    config.spikes.initial_slope = 0.0  # Slope at the first step, from where it rises to network.slope at the last; 0: constant.
    config.spikes.hard_share = 0.0  # Share of the neurons, drawn anew each step, that spike hard in training.
    config.spikes.finish = 0.0  # Share of the steps, the last ones, in which all spikes are hard (straight_through).
    config.warm_start = ""  # Folder of a finished run whose weights are the initial ones; empty: drawn by the seed.
    config.sam = ml_collections.ConfigDict()
    config.sam.rho = 0.2  # Radius of the perturbation; 0: no SAM, half the gradients.
    config.sam.perturbation = "independent"  # Direction: gradient of an independent or the same batch; noise; stale (last step).
    config.sam.perturbation_batch_size = 0  # Of an independent batch; 0: as batch_size. A smaller one costs less.
    config.sam.adaptive = "none"  # ASAM: element, filter (radius relative to the weights); none.
    config.sam.every_steps = 1  # Every how many steps weights are perturbed; the others cost one gradient.
    config.sam.start = 0.0  # Share of the steps, from 0 to 1, after which perturbing begins.
    config.sam.ascent = "global"  # On several devices: global, or per_device (each climbs the gradient of its own samples).

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"  # adam, adamw, or sgd (momentum 0.9).
    config.optimizer.learning_rate = 3e-3  # At the start of the schedule, or at the end of the warm-up.
    config.optimizer.schedule = "cosine"  # cosine: down to 0 at the end; constant.
    config.optimizer.warmup = 0.0  # Share of the steps, the first ones, in which the learning rate rises to its value.
    config.optimizer.weight_decay = 0.0  # Of adamw.

    config.batch_size = 32  # Of the descent batch.
    config.num_microbatches = 1  # Parts in which a batch is taken when it does not fit in memory at once.
    config.num_epochs = 12  # Passes over the training part by the descent batches.
    config.evaluate_every_epochs = 4  # On the validation part, in both modes.
    config.checkpoint_every_epochs = 4  # The last two checkpoints are kept.
    config.test = True  # Whether the test part is evaluated at the end; not in runs that only choose between settings.
    config.seed = 0  # Of the weights and of the batches.

    if variant == "cheap_sast":
        config.sam.perturbation_batch_size = 4  # A step costs 1.125 gradients instead of 2.
    if variant in ("baseline", "straight_through"):
        config.sam.rho = 0.0
    if variant == "straight_through":
        config.mode = "straight_through"
    return config
