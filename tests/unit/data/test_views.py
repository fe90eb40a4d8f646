"""Plans, order, loader and device stage: exact, and a function of (seed, epoch, sample) alone."""

import io
import math
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_annotations import annotate_image
from loader_cases import assert_same_batches
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mugs.data.loading.batch import NO_NOISE, make_box_noise
from mugs.data.loading.device import DeviceTransform
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import ImageInMemory
from mugs.data.sources.decode import DecodeError
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import (
    OPERATIONS,
    Operation,
    ViewPlan,
    draw_crop_box,
    intersect_over_union,
    plan_views,
)
from mugs.data.views.render.erase import ErasedBox, draw_boxes
from mugs.data.views.render.reference import apply_operation_pil
from mugs.hashed_draws import hashed_bits
from mugs.random_streams import derive_erase_key, make_image_key

SMALL = ViewRecipe(large_size=32, small_size=16, num_small=3)


class MemorySource:
    """Random images in memory, one of them broken at wish."""

    classes = ("a", "b")

    def __init__(self, num: int, broken: int | None = None) -> None:
        self.num, self.broken = num, broken

    def __len__(self) -> int:
        return self.num

    def read(self, index: int) -> bytes:
        if index == self.broken:
            return b"not an image"
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        return buffer.getvalue()

    def locate(self, index: int) -> ImageInMemory:
        return ImageInMemory(self.read(index))

    def label(self, index: int) -> int:
        return index % 2

    def describe(self, index: int) -> str:
        return f"sample {index}"


def batches(
    threads: int = 2, *, world: int = 1, rank: int = 0, start: int = 0, recipe: ViewRecipe = SMALL
):
    source = MemorySource(20)
    order = SampleOrder(20, seed=3, world=world, rank=rank, batch_size=4)
    loader = make_loader(source, recipe, order, seed=5, threads=threads, annotate=annotate_image)
    with closing(loader):
        return list(loader.iterate(start, 7))


def test_batches_do_not_depend_on_threads_or_start() -> None:
    one, two, late = batches(1), batches(3), batches(2, start=4)
    assert_same_batches(one + one[4:], two + late)


def test_ranks_share_the_global_batch() -> None:
    whole, parts = batches(), [batches(world=2, rank=r) for r in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.large, torch.cat([p[step].large for p in parts], dim=1))
        assert torch.equal(batch.ids, torch.cat([p[step].ids for p in parts]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num": 0}, "contains no images"),
        ({"world": 3}, "batch_size 4 does not divide over 3 ranks"),
        ({"batch_size": 22}, "batch_size 22 exceeds the 20 images"),
    ],
)
def test_orders_that_do_not_work_out(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SampleOrder(**{"num": 20, "seed": 0, "world": 2, "rank": 0, "batch_size": 4, **change})


def test_epochs_differ_and_cover_the_data() -> None:
    order = SampleOrder(20, seed=0, world=1, rank=0, batch_size=5)
    first = np.concatenate([order.indices(s) for s in range(4)])
    second = np.concatenate([order.indices(s) for s in range(4, 8)])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)


def test_two_epochs_by_turns_are_each_shuffled_once() -> None:
    order = SampleOrder(20, seed=3, world=1, rank=0, batch_size=4)
    apart = [order.indices(step).tolist() for step in (4, 5)]
    for _ in range(3):
        assert [order.indices(step).tolist() for step in (4, 5)] == apart
    assert order.permutation.cache_info().misses == 2


def test_order_pads_from_its_start() -> None:
    order = SampleOrder(10, seed=0, world=1, rank=0, batch_size=4, steps_per_epoch=3)
    taken = np.concatenate([order.indices(s) for s in range(3)])
    assert list(taken[10:]) == list(taken[:2])


def test_a_broken_sample_is_named_and_no_thread_stays() -> None:
    order = SampleOrder(8, seed=0, world=1, rank=0, batch_size=4)
    loader = make_loader(MemorySource(8, broken=5), SMALL, order, seed=0)
    with closing(loader), pytest.raises(DecodeError, match="sample 5"):
        list(loader.iterate(0, 2))
    assert not [t for t in threading.enumerate() if t.name.startswith("views")]


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_weak_prob_is_the_share_of_weak_views(prob: float) -> None:
    plans = [plan_views(0, 0, i, 50, 40, replace(SMALL, weak_prob=prob)) for i in range(400)]
    assert np.mean([p.weak for p in plans]) == pytest.approx(prob, abs=0.08)
    assert np.mean([not c.strong for p in plans for c in p.crops[4:]]) == pytest.approx(
        prob, abs=0.06
    )
    for plan in plans:
        assert not plan.crops[0].strong
        assert plan.crops[2].strong == plan.crops[3].strong == (not plan.weak)


def test_shared_large_crops_are_those_of_the_teacher() -> None:
    shared = replace(SMALL, large_crops="shared")
    plan = plan_views(0, 0, 1, 50, 40, shared)
    own = plan_views(0, 0, 1, 50, 40, replace(SMALL, weak_prob=1.0))
    assert plan.crops == own.crops[:2] + own.crops[4:]
    assert plan.weak
    assert not any(c.strong for c in plan.crops)
    released = replace(shared, weak_only_small="released", weak_prob=0.3)
    for i in range(9):
        usual = plan_views(0, 0, i, 50, 40, replace(SMALL, weak_prob=0.3))
        assert plan_views(0, 0, i, 50, 40, released).crops[2:] == usual.crops[4:]


def test_shared_large_crops_leave_every_pixel_as_it_is() -> None:
    """The small crops too, whose erased boxes have noise that depends on the number of the crop."""
    recipe = replace(SMALL, weak_prob=0.0, erase_prob=1.0, weak_only_small="released")
    shared = replace(recipe, large_crops="shared")
    for usual, ours in zip(batches(recipe=recipe), batches(recipe=shared), strict=True):
        before = DeviceTransform(torch.device("cpu"), recipe)(usual)
        after = DeviceTransform(torch.device("cpu"), shared)(ours)
        assert torch.equal(before.large[:2], after.large)
        assert torch.equal(before.small, after.small)
        assert (ours.noise.places >= ours.large.numel()).any()


def test_annotations_are_functions_of_the_sample_and_epoch() -> None:
    for step, batch in enumerate(batches()):
        assert batch.extras["noise"].shape == (4, 2, 3)
        assert batch.extras["epoch"].tolist() == [step // 5] * 4
    noise = torch.cat([batch.extras["noise"] for batch in batches()[:5]])
    assert len(set(noise[:, 0, 0].tolist())) == 20


@pytest.mark.parametrize("large_crops", ["own", "shared"])
def test_the_second_large_crop_overlaps_the_first(large_crops: str) -> None:
    recipe = replace(SMALL, large_crops=large_crops, large_scale=(0.2, 1.0))
    usual = [plan_views(0, 0, i, 64, 48, recipe) for i in range(200)]
    plans = [plan_views(0, 0, i, 64, 48, replace(recipe, min_overlap=0.2)) for i in range(200)]

    def overlaps(plans: list[ViewPlan]) -> list[float]:
        pairs = [
            (p.crops[i].box, p.crops[i + 1].box)
            for p in plans
            for i in range(0, len(p.crops) - 3, 2)
        ]
        return [intersect_over_union(one, other) for one, other in pairs]

    assert min(overlaps(usual)) < 0.1
    assert min(overlaps(plans)) > 0.2
    # Only the second box of a pair that overlaps too little is another one.
    for one, other in zip(usual, plans, strict=True):
        assert one.crops[0].box == other.crops[0].box
        if intersect_over_union(one.crops[0].box, one.crops[1].box) > 0.2:
            assert one.crops[1] == other.crops[1]


def test_a_box_that_cannot_overlap_is_the_whole_image() -> None:
    recipe = replace(SMALL, large_crops="shared", large_scale=(0.2, 1.0), min_overlap=0.2)
    assert plan_views(0, 0, 0, 300, 10, recipe).crops[1].box == (0, 0, 300, 10)


class Corner:
    """Stands in for a generator: its integers are the left and the top of a box."""

    def __init__(self, left: int, top: int) -> None:
        self.places = [left, top]

    def integers(self, low: int, high: int) -> int:
        place = self.places.pop(0)
        assert low <= place < high
        return place


@pytest.mark.parametrize(("width", "height"), [(640, 480), (900, 400), (60, 600)])
def test_boxes_are_those_of_torchvision(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draw by draw; of 60 x 600 pixels also the largest centered box, after ten tries."""
    monkeypatch.setattr(
        "mugs.data.views.plan.draw_uniform",
        lambda _, low, high: torch.empty(1).uniform_(low, high).item(),
    )
    image = torch.empty(3, height, width)
    scale = 0.2, 1.0
    ratio = 3 / 4, 4 / 3
    for seed in range(100):
        torch.manual_seed(seed)
        top, left, high, wide = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        torch.manual_seed(seed)
        box = draw_crop_box(Corner(left, top), width, height, scale, ratio)
        assert box == (left, top, wide, high)


def test_one_coin_per_image() -> None:
    for i in range(20):
        plan = plan_views(0, 0, i, 50, 40, replace(SMALL, student_strength_draw="per_image"))
        assert len({c.strong for c in plan.crops[2:]}) == 1


def test_randaugment_never_repeats_unless_asked() -> None:
    def repeats(recipe: ViewRecipe) -> int:
        plans = [plan_views(0, 0, i, 50, 40, replace(recipe, weak_prob=0.0)) for i in range(300)]
        pairs = [
            [o.name for o in c.operations] for p in plans for c in p.crops if len(c.operations) == 2
        ]
        return sum(a == b for a, b in pairs)

    assert repeats(SMALL) == 0
    assert repeats(replace(SMALL, randaugment_replacement=True)) > 0


@pytest.mark.parametrize(("num", "prob"), [(1, 1.0), (4, 1.0), (3, 0.25)])
def test_parameters_of_randaugment(num: int, prob: float) -> None:
    recipe = replace(
        SMALL,
        weak_prob=0.0,
        randaugment_num=num,
        randaugment_prob=prob,
        randaugment_magnitude=(3.0, 0.0),
    )
    crops = [c for i in range(200) for c in plan_views(0, 0, i, 50, 40, recipe).crops if c.strong]
    counts = [len(c.operations) for c in crops]
    assert max(counts) == num and np.mean(counts) == pytest.approx(num * prob, abs=0.1)
    assert {abs(o.value) for c in crops for o in c.operations if o.name == "rotate"} == {9.0}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_the_size(name: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    value = {"posterize": 0.0, "solarize": 26.0, "solarize_add": 99.0}.get(name, 0.27)
    out = apply_operation_pil(image, Operation(name, value, bicubic=True))
    assert (out.size, out.mode) == ((40, 30), "RGB")
    if name == "posterize":
        assert np.asarray(out).max() == 0


def test_one_pixel_image() -> None:
    plan = plan_views(0, 0, 0, 1, 1, SMALL)
    assert all(c.box == (0, 0, 1, 1) for c in plan.crops)


def test_erasing_is_normal_and_before_or_after_normalising() -> None:
    recipe = replace(SMALL, weak_prob=0.0, erase_prob=1.0)
    batch = batches(recipe=recipe)[0]
    before = DeviceTransform(torch.device("cpu"), recipe)(batch)
    after = DeviceTransform(torch.device("cpu"), replace(recipe, erase_before_norm=False))(batch)

    def erased(views: torch.Tensor) -> torch.Tensor:
        places = batch.noise.places
        return views.flatten()[places[places < batch.large.numel()]]

    assert erased(after.large).std() == pytest.approx(1.0, abs=0.05)
    assert erased(before.large).std() == pytest.approx(4.43, abs=0.25)
    assert erased(before.large).mean() == pytest.approx(-2.0, abs=0.3)


def test_noise_of_a_box_is_a_hash_of_its_crop_and_pixel() -> None:
    """As if every box were filled on its own, in the order channel, row, column."""
    recipe = replace(SMALL, weak_prob=0.0, erase_prob=0.7, erase_before_norm=False)
    (batch, *_) = batches(recipe=recipe)
    found = DeviceTransform(torch.device("cpu"), recipe)(batch)
    plain = DeviceTransform(torch.device("cpu"), recipe)(replace(batch, noise=NO_NOISE))
    boxes = 0
    for slot, sample in enumerate(batch.ids.tolist()):
        image_key = make_image_key(5, batch.epoch, sample)
        plan = plan_views(5, batch.epoch, sample, 50, 40, recipe)
        for index, crop in enumerate(plan.crops):
            x, y, w, h = crop.erase
            is_small = index >= 4
            views = plain.small[index - 4] if is_small else plain.large[index]
            if w > 0:
                key = derive_erase_key(image_key, index)
                views[slot, :, y : y + h, x : x + w] = draw_normal(key, 3 * h * w).view(3, h, w)
                boxes += 1
    assert boxes > 5
    assert torch.equal(found.large, plain.large)
    assert torch.equal(found.small, plain.small)


def draw_normal(key: int, count: int) -> torch.Tensor:
    bits = hashed_bits(key, count, torch.device("cpu"))
    u = (bits & 0xFFFFFF).float().add_(0.5).div_(1 << 24)
    v = ((bits >> 24) & 0xFFFFFF).float().div_(1 << 24)
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


def test_noise_is_normal() -> None:
    noise = make_box_noise([draw_boxes(0, 0, 0, [ErasedBox(2, (8, 0, 200, 190), 5, 220)])])
    assert len(noise.values) == 3 * 200 * 190
    assert noise.values.mean().abs() < 0.01
    assert noise.values.std() == pytest.approx(1, abs=0.01)
    assert noise.places[[0, 199, 200]].tolist() == [13, 212, 233]


def test_a_crop_may_span_one_side_of_the_image() -> None:
    """Half of the area of 20 x 40 pixels as a square is as wide as the image, wherever it is."""
    rng = np.random.default_rng(0)
    for turned in (False, True):
        size = (40, 20) if turned else (20, 40)
        boxes = [draw_crop_box(rng, *size, (0.5, 0.5), (1.0, 1.0)) for _ in range(60)]
        assert {box[2:] for box in boxes} == {(20, 20)}
        assert {box[not turned] for box in boxes} <= set(range(21))
        assert len({box[not turned] for box in boxes}) > 10 and {box[turned] for box in boxes} == {
            0
        }
