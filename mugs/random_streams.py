"""Counter-based random numbers and the list of all streams they are drawn from.

Every draw is a function of what it is for, never of the worker, rank or restart that makes it. So
runs are repeatable on any number of GPUs, and no generator state has to be saved in a checkpoint.

A stream is one sequence of random numbers. It is chosen by a key and a stream number. Each class
below lists the stream numbers that are used with one kind of key. To add a stream, add a member;
`unique` refuses a number that is taken. Changing a number changes the results of every later run.

Two kinds of draws have no stream number. Initial weights come from `torch.manual_seed(seed)`. In
fine-tuning, timm's transforms and mixing use `numpy.random.SeedSequence` of (seed, epoch, sample,
copy) and (seed, step, group), see `mugs.finetune.batches` and `mugs.finetune.mixing`.
"""

from enum import IntEnum, unique
from typing import Any

from numpy.random import Generator, Philox

MASK_64_BITS = (1 << 64) - 1

# Increment and multipliers of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
# number generators"; finalizer by Stafford, variant 13). They are part of every result.
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


@unique
class SampleStream(IntEnum):
    """Streams of one sample in one epoch; used with `make_generator`."""

    CROPS = 0
    """Views of pretraining: crop i draws from CROPS + i, so 0 to 199 are reserved for crops."""
    PROBE_VIEW = 200
    """The training view of a linear probe."""
    DETECTION_VIEW = 202
    """Scale, crop and flip of a detection training view; the sample is the COCO image id."""
    SCENE_VIEW = 210
    """Scale, crop, flip and color distortion of a segmentation training view."""
    ANNOTATIONS = 254
    """What a method draws of an image besides its views."""
    VIEW_STRENGTH = 255
    """Whether the student's crops are weak or strong."""


@unique
class EpochStream(IntEnum):
    """Streams of one epoch; used with `make_item_generator`, the item is the epoch.

    Keys (seed, epoch) and (seed, epoch << 40 | sample) can be equal, so these numbers lie above all
    of `SampleStream`.
    """

    SAMPLE_ORDER = 1 << 32
    """The permutation of the samples, in every stage but detection."""
    DETECTION_ORDER = 1 << 33
    """Images of equal orientation in passes, and the order of the passes."""


@unique
class ClassStream(IntEnum):
    """Streams of one class; used with `make_item_generator`, the item is the label.

    It is the stream of crop 0 in epoch 0. That does no harm, as nothing compares the two draws, and
    another number would change which images the labeled subsets hold.
    """

    SUBSET = 0
    """The order in which images of a class enter a labeled subset."""


@unique
class DemoStream(IntEnum):
    """Streams of one image or video of the demo data; used with `make_item_generator`.

    They equal streams of crops for the same reason as `ClassStream`. (The handwritten digits are
    one sequence, `Philox(0)`, as they are written in one pass.)
    """

    TRAIN_SCENES = 0
    VAL_SCENES = 1
    VIDEOS = 2
    TRAIN_COCO = 16
    VAL_COCO = 17


@unique
class DetectionStream(IntEnum):
    """Draws of the detector on one image; used with `derive_detection_key`."""

    RPN_SAMPLES = 0
    """Which anchors the RPN's loss is computed on."""
    STAGE_SAMPLES = 1
    """Which boxes stage i of the cascade is trained on: STAGE_SAMPLES + i, three stages."""
    STOCHASTIC_DEPTH = 4
    """Which branches of the backbone are dropped."""


@unique
class StepStream(IntEnum):
    """Draws for the whole global batch of one optimizer step; used with `step_seed`."""

    DROPOUT = 0
    """Channels that the segmentation heads drop."""
    STOCHASTIC_DEPTH = 1
    """Residual branches that are dropped, in all stages but detection."""


@unique
class StateStream(IntEnum):
    """Start values of what Mugs keeps of past steps; used with `state_seed`.

    A memory draws a second table from the next number, so 11 and 21 are taken too.
    """

    INSTANCE_QUEUE = 1
    LOCAL_GROUP_QUEUE = 2
    STUDENT_MEMORY = 10
    TEACHER_MEMORY = 20


def make_generator(seed: int, epoch: int, sample: int, stream: int) -> Generator:
    """Return the generator of one `SampleStream` of one sample in one epoch."""
    # 40 bits leave room for 10 ** 12 samples and 10 ** 7 epochs in one 64-bit word of the key.
    return make_item_generator(seed, (epoch << 40) | sample, stream)


def make_item_generator(seed: int, item: int, stream: int) -> Generator:
    """Return the generator of one stream of one item (an epoch, a class, an image of the demo)."""
    # Philox counts draws in the low words of its counter. The stream number in the highest word
    # keeps two streams of one key apart for the first 2 ** 192 draws.
    return Generator(Philox(key=[seed, item], counter=[0, 0, 0, stream]))


def switch_stream(rng: Generator, fresh: dict[str, Any], stream: int) -> None:
    """Turn a sample's generator into that of another of its streams.

    This takes a fifth of the time of a new generator, which counts with 14 crops per image.

    Args:
        rng: a generator made by `make_generator`.
        fresh: the state of `rng` before anything was drawn; changed in place.
        stream: the stream to draw from next.
    """
    fresh["state"]["counter"][3] = stream
    rng.bit_generator.state = fresh


def draw_uniform(rng: Generator, low: float, high: float) -> float:
    """Return a draw from U(low, high), as `Generator.uniform` does, in a third of its time."""
    return low + (high - low) * rng.random()


def step_seed(seed: int, step: int, stream: StepStream) -> int:
    """Return the torch seed of a stream of one optimizer step."""
    # The prime keeps (seed, step) pairs apart for a million steps; the factor 2 makes room for two
    # streams.
    return (seed * 1_000_003 + step) * 2 + stream


def state_seed(seed: int, stream: StateStream) -> int:
    """Return the torch seed of the start values of a queue or memory."""
    return seed * 100 + stream


def make_image_key(seed: int, epoch: int, sample: int) -> int:
    """Return a 64-bit key of one sample in one epoch.

    For `mugs.hashed_draws.hashed_bits` and `derive_erase_key`.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ sample)


def derive_erase_key(image_key: int, crop: int) -> int:
    """Return the key of the noise in the erased box of one crop of an image."""
    return splitmix64(image_key ^ crop)


def derive_detection_key(image_key: int, stream: int) -> int:
    """Return the key of one `DetectionStream` of an image."""
    return splitmix64(image_key + stream)


def splitmix64(value: int) -> int:
    """Return the splitmix64 hash of an integer, as an integer of 64 bits."""
    value = (value + GAMMA) & MASK_64_BITS
    value = ((value ^ (value >> 30)) * MULTIPLIER_1) & MASK_64_BITS
    value = ((value ^ (value >> 27)) * MULTIPLIER_2) & MASK_64_BITS
    return value ^ (value >> 31)
