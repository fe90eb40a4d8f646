"""iBOT's step equals a loop-by-loop reference, on one, two and four ranks, in micro-batches."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from method_cases import RANKS, TINY_VIT, MethodCase, compare_with_naive, list_seeds, run_method
from naive_ibot import NaiveIbot
from ranks import spawn
from torch import Tensor

from mugs.data.views.config import ViewRecipe
from mugs.methods.config import IbotConfig
from mugs.methods.ibot import Ibot

SMALLEST = IbotConfig(
    arch=TINY_VIT,
    drop_path=0.0,
    head_hidden=16,
    bottleneck=8,
    num_prototypes=24,
    teacher_warmup_epochs=2,
)
SWITCHES: dict[str, tuple[object, ...]] = {
    "train_prototype_magnitude": (True, False),
    "shared_head": (True, False),
    "student_temperature": (0.1, 0.2),
    "teacher_temperature": ((0.04, 0.07), (0.06, 0.06)),
    "patch_teacher_temperature": ((0.04, 0.07), (0.05, 0.05)),
    "center_momentum": (0.9, 0.5),
    "teacher_warmup_epochs": (2, 0),
    "loss_weights": ((1.0, 1.0), (1.0, 0.5)),
    "mask_start_epoch": (0, 1),
    "clustering_input": ("masked", "unmasked"),
}


def masks(share: float, num: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks of the smallest grid, 4 x 4, every third crop without one, at most 8 patches each."""
    drawn = torch.rand(num, 2, 4, 4, generator=generator) < share
    drawn &= torch.rand(num, 2, 1, 1, generator=generator) > 1 / 3
    # As the method's own masks never exceed the most that its settings allow.
    return {"masks": drawn & (drawn.flatten(2).cumsum(2).view_as(drawn) <= 8)}


def random_case(seed: int) -> MethodCase:
    """A case drawn from a seed: every switch, crops, micro-batches, clipping and freezing."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: tuple[object, ...]) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    changes = {name: pick(values) for name, values in SWITCHES.items()}
    if not changes["shared_head"]:
        changes["num_patch_prototypes"] = pick((None, 40))
    config = replace(SMALLEST, **changes)
    return MethodCase(
        config,
        num_large=pick((2, 4)) if config.clustering_input == "unmasked" else 2,
        num_small=pick((0, 1, 3)),
        micro_batches=pick((1, 2)),
        batch=8,
        clip=pick((0.0, 0.05)),
        frozen_epochs=pick((0, 1)),
        extras=partial(masks, pick((0.0, 0.3, 0.9))),
        seed=seed,
    )


@pytest.mark.parametrize(
    ("switch", "value"), [(name, values[1]) for name, values in SWITCHES.items()]
)
def test_each_switch(switch: str, value: object) -> None:
    case = MethodCase(SMALLEST, clip=0.05, extras=partial(masks, 0.4))
    other = replace(case, options=replace(SMALLEST, **{switch: value}))
    compare_with_naive(other, NaiveIbot)
    one, two = run_method(case), run_method(other)
    magnitude = "head.last_layer.weight_g"
    same = one.losses == two.losses and torch.equal(one.student[magnitude], two.student[magnitude])
    assert not same, "the switch is accepted and ignored"


@pytest.mark.parametrize("seed", list_seeds(4, 8))
def test_random_configurations(seed: int) -> None:
    compare_with_naive(random_case(seed), NaiveIbot)


def on_rank(_rank: int, seeds: int, exact: bool) -> None:
    for seed in range(seeds):
        compare_with_naive(random_case(seed), NaiveIbot, exact=exact)


@pytest.mark.parametrize(("world", "seeds", "exact"), RANKS)
def test_ranks_equal_the_global_batch(world: int, seeds: int, exact: bool) -> None:
    spawn(on_rank, world, seeds, exact)


def test_masks_need_the_crops_of_the_teacher() -> None:
    """Large crops of the student's own have no teacher's patch at the same position."""
    own = ViewRecipe(large_crops="own")
    with pytest.raises(ValueError, match=r"large_crops is own.*clustering_input to unmasked"):
        SMALLEST.check_views(own)
    replace(SMALLEST, clustering_input="unmasked").check_views(own)
    SMALLEST.check_views(ViewRecipe(large_crops="shared"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_patch_prototypes": 8}, "num_patch_prototypes: shared_head is true"),
        ({"mask_ratios": (0.3,)}, "mask_half_widths has 2 values and mask_ratios 1"),
        ({"mask_ratios": (0.0, 0.9)}, r"0\.9 \+- 0\.2 is not within 0 and 1"),
        ({"mask_ratios": (), "mask_half_widths": ()}, "nothing would ever be masked"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALLEST, **changes)


def test_teacher_has_no_mask_vector() -> None:
    method = Ibot(SMALLEST)
    own = set(method.student.state_dict()) - set(method.teacher.state_dict())
    assert own == {"masked_embed"}
    assert method.student.masked_embed is not None
    assert method.student.masked_embed.shape == (1, TINY_VIT.embed_dim)
    assert not method.student.masked_embed.any()
