"""The local-group memory: its names in checkpoints."""

import pytest
import torch

from mugs.models.memory import NeighborMemory


@pytest.mark.parametrize("common_start", [True, False])
def test_checkpoints_with_the_former_names_still_load(common_start: bool) -> None:
    parent = torch.nn.Module()
    parent.memory = NeighborMemory(6, 4, seed=3, common_start=common_start)
    former = {"memory.compare": torch.rand(6, 4), "memory.pointer": torch.tensor(5)}
    if not common_start:
        former["memory.separate"] = torch.rand(6, 4)
    parent.load_state_dict(former)

    values = former["memory.compare" if common_start else "memory.separate"]
    query = former["memory.compare"][2:3]
    torch.testing.assert_close(parent.memory.find_neighbors(query, 1)[0], values[2:3])
    assert int(parent.memory.pointer) == 5
    names = {"memory.keys", "memory.pointer"} | (set() if common_start else {"memory.values"})
    assert set(parent.state_dict()) == names
