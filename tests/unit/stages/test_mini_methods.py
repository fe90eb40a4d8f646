"""The plan of `mini_methods`: every method is measured before and after its pretraining, and its
tables have a row for each of their methods.
"""

from functools import cache

import pytest

from mugs.methods.config import METHODS
from pipeline import config
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from stages import STAGES
from stages.coco_detection import CocoDetectionConfig
from stages.pretrain import PretrainConfig


@cache
def plan() -> dict[str, StageRun]:
    """The runs by their ids."""
    runs = build_plan(config.load_reproduction("mini_methods", STAGES))
    return {run.run_id: run for run in runs}


def find_evaluations(stage: str, method: str) -> list[tuple[StageRun, StageRun]]:
    """Return the runs of a stage whose weights, or features of weights, are of the method, each
    with the pretraining of these weights.
    """
    found = []
    for run in plan().values():
        source = run
        if "features" in source.needs:
            source = plan()[source.needs["features"]]
        if run.stage == stage and "weights" in source.needs:
            pretraining = plan()[source.needs["weights"]]
            if getattr(pretraining.config, "method", "") == method:
                found.append((run, pretraining))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_neighbors_before_and_after_the_pretraining(method: str) -> None:
    compared: dict[str, set[bool]] = {}
    for run, pretraining in find_evaluations("knn", method):
        is_before = getattr(run.config, "weights", "") == "initial"
        compared.setdefault(pretraining.name, set()).add(is_before)
    assert {False, True} in compared.values(), f"{method} is not measured before and after"


@pytest.mark.parametrize("method", ["mugs", "dino", "ibot"])
def test_table_8_has_weak_and_strong_augmentation(method: str) -> None:
    shares = set()
    for _, pretraining in find_evaluations("linear", method):
        assert isinstance(pretraining.config, PretrainConfig)
        shares.add(pretraining.config.views.weak_prob)
    assert shares == {1.0, 0.5}


def test_tables_of_mgc() -> None:
    heads = set()
    for run, _ in find_evaluations("coco_detection", "mgc"):
        assert isinstance(run.config, CocoDetectionConfig)
        heads.add(run.config.detector.heads)
    assert heads == {"mask_rcnn"}
    segmenters = find_evaluations("ade20k_segmentation", "mgc")
    assert {getattr(run.config, "variant", "") for run, _ in segmenters} == {"semantic_fpn"}
