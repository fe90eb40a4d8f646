"""Label propagation and its scores against values of the released code and of DAVIS' evaluator."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import Golden, read_facts

from mugs.data.dense.label_maps import VOID
from mugs.transfer.video.config import PropagationRecipe
from mugs.transfer.video.j_and_f import (
    average_scores,
    boundary_accuracy,
    region_similarity,
    score_objects,
)
from mugs.transfer.video.propagation import harden_labels, propagate_labels

VIDEOS = tuple(read_facts("video_scores")["videos"])
CASES = tuple(read_facts("video_propagation"))


def read_video(golden: Golden, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    truth = golden[f"{name}.truth"].numpy().copy()
    truth[truth == VOID] = 0
    return golden[f"{name}.prediction"].numpy(), truth, int(truth[0].max())


@pytest.mark.parametrize("name", VIDEOS)
def test_scores_of_a_video(name: str) -> None:
    golden = Golden("video_scores")
    facts = golden.facts["videos"][name]
    predicted, truth, objects = read_video(golden, name)
    assert objects == facts["objects"]
    for number in range(objects):
        for place, frame in enumerate(range(1, facts["frames"] - 1)):
            masks = predicted[frame] == number + 1, truth[frame] == number + 1
            found = region_similarity(*masks), boundary_accuracy(*masks)
            expected = [facts[f"{m}_per_frame"][number][place] for m in "JF"]
            assert found == pytest.approx(expected, abs=1e-9)
    table = score_objects(predicted, truth, objects)
    expected_table = np.stack([facts["J"], facts["F"]], axis=1)
    np.testing.assert_allclose(table, expected_table, rtol=0, atol=1e-9)


def test_means_over_the_objects_of_all_videos() -> None:
    golden = Golden("video_scores")
    table = np.concatenate([score_objects(*read_video(golden, name)) for name in VIDEOS])
    found = average_scores(table)
    expected = golden.facts["J_mean"], golden.facts["F_mean"]
    assert (found.j / 100, found.f / 100) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_propagation(case: str) -> None:
    """Ties at the fifth source are all kept; an object that covers a frame wins everywhere."""
    golden = Golden("video_propagation")
    facts = golden.facts[case]
    grid = tuple(facts["grid"])
    recipe = PropagationRecipe(
        previous_frames=facts["num_previous"],
        num_neighbours=facts["num_neighbours"],
        temperature=facts["temperature"],
        radius=facts["radius"],
    )
    features = F.normalize(golden[f"{case}.features"], dim=-1)
    soft = list(propagate_labels(features, golden[f"{case}.first_labels"], grid, recipe))
    assert (torch.stack(soft) - golden[f"{case}.soft_labels"]).abs().max() <= 1e-5
    if case != "ties_uniform":  # its maps hang on rounding
        maps = torch.stack([harden_labels(one, grid, facts["patch"]) for one in soft])
        assert torch.equal(maps, golden[f"{case}.maps"])
