"""Streams draw the same numbers for ever, and no two of one key share a number."""

import enum
import hashlib
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox

from mugs import random_streams
from mugs.data.loading.order import SampleOrder
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import draw_erase_box, plan_views
from mugs.finetune.batches import BatchSampler
from mugs.finetune.config import MixOptions
from mugs.finetune.mixing import draw_mix
from mugs.hashed_draws import hashed_bits
from mugs.random_streams import (
    EpochStream,
    SampleStream,
    StateStream,
    StepStream,
    derive_detection_key,
    derive_erase_key,
    make_generator,
    make_image_key,
    make_item_generator,
    splitmix64,
    state_seed,
    step_seed,
    switch_stream,
)
from mugs.transfer.detection.config import Scales
from mugs.transfer.detection.views import draw_detection_plan
from mugs.transfer.segmentation.config import SceneRecipe
from mugs.transfer.segmentation.views import draw_crop

CPU = torch.device("cpu")
NUMBERS = {
    "SampleStream": {
        "CROPS": 0,
        "PROBE_VIEW": 200,
        "DETECTION_VIEW": 202,
        "SCENE_VIEW": 210,
        "VIEW_STRENGTH": 255,
    },
    "EpochStream": {"SAMPLE_ORDER": 2**32, "DETECTION_ORDER": 2**33},
    "ClassStream": {"SUBSET": 0},
    "DemoStream": {
        "TRAIN_SCENES": 0,
        "VAL_SCENES": 1,
        "VIDEOS": 2,
        "TRAIN_COCO": 16,
        "VAL_COCO": 17,
    },
    "DetectionStream": {"RPN_SAMPLES": 0, "STAGE_SAMPLES": 1, "STOCHASTIC_DEPTH": 4},
    "StepStream": {"DROPOUT": 0, "STOCHASTIC_DEPTH": 1},
    "StateStream": {
        "INSTANCE_QUEUE": 1,
        "LOCAL_GROUP_QUEUE": 2,
        "STUDENT_MEMORY": 10,
        "TEACHER_MEMORY": 20,
    },
}


WEAK = ViewRecipe(large_crops="shared", weak_only_small="released")
OVERLAP = ViewRecipe(min_overlap=0.4, student_strength_draw="per_image", weak_prob=0.2)
TWICE = ViewRecipe(randaugment_replacement=True, erase_prob=0.5, interpolation="bilinear")
SHORT = SampleOrder(22, seed=3, world=2, rank=1, batch_size=4, short_last=True)
REPEATED = BatchSampler(300, seed=1, batch_size=16, repeats=3)
LABELS = torch.arange(64).expand(40, 64) // 24
# Of each number, what is drawn for it; and the first figures of the SHA-256 of the text of all.
DRAWS: dict[str, tuple[Callable[[int], object], str]] = {
    "views": (lambda i: plan_views(3, 1, i, 60, 40, ViewRecipe()), "44c0ef7c7034"),
    "shared crops": (lambda i: plan_views(3, 1, i, 60, 40, WEAK), "c91a732b02cb"),
    "overlapping crops": (lambda i: plan_views(3, 1, i, 60, 40, OVERLAP), "48a91e579a0b"),
    "operations": (lambda i: plan_views(3, 1, i, 40, 60, TWICE), "687dd37e565e"),
    "boxes": (lambda i: draw_erase_box(seeded(i), 6), "49bb1ae461a6"),
    "detection": (lambda i: draw_detection_plan(seeded(i), (60, 90), Scales()), "9f4ec85b7df4"),
    "scenes": (lambda i: draw_crop(LABELS, seeded(i), SceneRecipe(crop=32)), "81f6d90b217b"),
    "mixing": (lambda i: draw_mix(MixOptions(), 1, i, 2, 20, 14), "907ae1536f81"),
    "order": (lambda i: SHORT.indices(i).tolist(), "bc13ccc15e04"),
    "repeats": (lambda i: REPEATED.view_requests(i, np.arange(16)), "59e41df50c39"),
}


def seeded(number: int) -> Generator:
    return Generator(Philox(number))


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_stays(name: str) -> None:
    """Change a hash only with a change that is meant to change results."""
    draw, expected = DRAWS[name]
    text = repr([draw(number) for number in range(300)])
    # The last figures depend on the processor's functions.
    text = re.sub(r"\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.6g}", text)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == expected


def test_no_stream_number_changes() -> None:
    """A changed number changes every later result: add new members, leave these."""
    found = {
        name: {member.name: int(member) for member in kind}
        for name, kind in vars(random_streams).items()
        if isinstance(kind, type) and issubclass(kind, enum.IntEnum) and kind is not enum.IntEnum
    }
    for name, numbers in NUMBERS.items():
        assert numbers.items() <= found[name].items()
    assert max(SampleStream) < min(EpochStream)


def test_generators_are_philox_with_the_stream_in_the_highest_word() -> None:
    expected = Generator(Philox(key=[7, (3 << 40) | 11], counter=[0, 0, 0, 255]))
    ours = make_generator(7, 3, 11, SampleStream.VIEW_STRENGTH)
    assert ours.random(9).tolist() == expected.random(9).tolist()
    order = Generator(Philox(key=[7, 3], counter=[0, 0, 0, 1 << 32])).permutation(20)
    ours = make_item_generator(7, 3, EpochStream.SAMPLE_ORDER)
    assert ours.permutation(20).tolist() == order.tolist()


def test_a_switched_generator_is_that_of_the_stream() -> None:
    rng = make_generator(5, 2, 9, 255)
    fresh = dict(rng.bit_generator.state)
    for crop in (3, 0, 13):
        rng.integers(7, size=3), rng.normal(), rng.permutation(4)  # leave something in its buffers
        switch_stream(rng, fresh, crop)
        expected = make_generator(5, 2, 9, crop)
        assert rng.integers(7, size=5).tolist() == expected.integers(7, size=5).tolist()
        assert rng.random(9).tolist() == expected.random(9).tolist()


def test_splitmix64_gives_the_published_sequence() -> None:
    """The first three outputs of the reference implementation from state 0."""
    gamma = 0x9E3779B97F4A7C15
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(i * gamma % 2**64) for i in range(3)] == published
    bits = hashed_bits(gamma, 3, CPU).numpy().astype(np.uint64)
    assert bits.tolist() == published


def test_keys_and_seeds_are_those_of_finished_runs() -> None:
    key = make_image_key(1, 2, 3)
    assert key == splitmix64(splitmix64(splitmix64(1) ^ 2) ^ 3)
    assert derive_erase_key(key, 5) == splitmix64(key ^ 5)
    assert derive_detection_key(key, 4) == splitmix64(key + 4)
    assert step_seed(2, 9, StepStream.DROPOUT) == 4_000_030
    assert step_seed(2, 9, StepStream.STOCHASTIC_DEPTH) == 4_000_031
    assert state_seed(4, StateStream.TEACHER_MEMORY) == 420
