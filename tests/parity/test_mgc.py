"""MGC's step equals a loop-by-loop reference, on one, two and four ranks."""

from dataclasses import replace

import pytest
import torch
from method_cases import MethodCase, compare_with_naive, list_seeds, run_method
from naive_mgc import NaiveMgc
from ranks import spawn
from torch import Tensor

from mugs.methods.config import MgcConfig
from mugs.methods.mgc import Mgc
from mugs.models.config import ViTConfig
from mugs.pretrain.agreement import check_equal_on_all_ranks

SMALLEST = MgcConfig(
    arch=ViTConfig(
        embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32, positions="sincos"
    ),
    drop_path=0.0,
    head_hidden=16,
    head_out=8,
    windows=(1, 2, 4),
    num_pairs=(6, 4, 2),
)
SWITCHES: dict[str, tuple[object, ...]] = {
    "temperature": (0.1, 0.2),
    "overlap_weighting": (False, True),
    "teacher_init": ("independent", "copy"),
    "final_norm_bias": ("trained", "frozen"),
    "padding": ("counted", "ignored"),
    "windows": ((1, 2, 4), (1, 1, 2)),
    "num_pairs": ((6, 4, 2), (3, 5, 1)),
    "row_strides": (SMALLEST.row_strides, ((1, 1, 1), (4, 1, 2), (1, 1, 1))),
    "column_strides": (SMALLEST.column_strides, ((5, 1, 3), (1, 1, 1), (1, 1, 1))),
}


def draw_geometry(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Boxes that overlap, of the first image equal ones, and flips."""
    corners = torch.randint(0, 30, (num, 2, 2), generator=generator)
    sizes = torch.randint(40, 90, (num, 2, 2), generator=generator)
    boxes = torch.cat([corners, sizes], dim=-1)
    boxes[0, 1] = boxes[0, 0]
    return {"boxes": boxes, "flips": torch.rand(num, 2, generator=generator) < 0.5}


CASE = MethodCase(
    SMALLEST, num_small=0, batch=4, clip=0.05, steps=2, decay="all", extras=draw_geometry
)


def without_effect(name: str) -> bool:
    """Shifts that all rows of a batch normalization share, which it takes out."""
    return name == "backbone.norm.bias"


def compare(case: MethodCase, exact: bool = True) -> None:
    compare_with_naive(case, NaiveMgc, exact=exact, scale=100, without_effect=without_effect)


def random_case(seed: int) -> MethodCase:
    """A case drawn from a seed: every switch, clipping and decay of matrices and vectors."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: tuple[object, ...]) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    config = replace(SMALLEST, **{name: pick(values) for name, values in SWITCHES.items()})
    return replace(CASE, options=config, batch=pick((4, 8)), clip=pick((0.0, 0.05)), seed=seed)


@pytest.mark.parametrize(
    ("switch", "value"), [(name, values[1]) for name, values in SWITCHES.items()]
)
def test_each_switch(switch: str, value: object) -> None:
    other = replace(CASE, options=replace(SMALLEST, **{switch: value}))
    compare(other)
    one, two = run_method(CASE), run_method(other)
    bias = "backbone.norm.bias"
    same = one.losses == two.losses and torch.equal(one.student[bias], two.student[bias])
    assert not same, "the switch is accepted and ignored"


@pytest.mark.parametrize("seed", list_seeds(2, 4))
def test_random_configurations(seed: int) -> None:
    compare(random_case(seed))


def on_rank(_rank: int, seeds: int, exact: bool) -> None:
    # There is nothing that could differ.
    check_equal_on_all_ranks(Mgc(SMALLEST).extra_state)
    for seed in range(seeds):
        compare(random_case(seed), exact)


# Fewer than of the other methods: its reference loops over pairs of cells.
@pytest.mark.parametrize(
    ("world", "seeds", "exact"),
    [
        (2, 1, False),
        pytest.param(4, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 8, True, marks=pytest.mark.long),
        pytest.param(4, 8, True, marks=pytest.mark.long),
    ],
)
def test_ranks_equal_the_global_batch(world: int, seeds: int, exact: bool) -> None:
    spawn(on_rank, world, seeds, exact)


def test_first_weights_of_the_teacher() -> None:
    """All but Linear layers are the student's, or all of them; positions have no gradient."""
    for init, copied in (("independent", False), ("copy", True)):
        method = Mgc(replace(SMALLEST, teacher_init=init), seed=3)
        student = dict(method.student.named_parameters())
        linear = {
            f"{name}.weight"
            for name, module in method.teacher.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for name, parameter in method.teacher.named_parameters():
            assert torch.equal(parameter, student[name]) == (copied or name not in linear), name
        assert not student["backbone.pos_embed"].requires_grad
        assert "predictors.part.0.weight" in student


@pytest.mark.parametrize("windows", [(1, 3, 4), (1, 2, 5)])
def test_windows_that_do_not_fill_the_crop_are_refused(windows: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="do not fill a side of 4"):
        Mgc(replace(SMALLEST, windows=windows))
