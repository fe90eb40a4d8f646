"""Small checkpoints whose content says of which step they are."""

from pathlib import Path

import torch

from mugs.checkpoint.record import checkpoint_name
from mugs.checkpoint.save_load import SavePolicy, StateDicts, load_latest, save_checkpoint

POLICY = SavePolicy(retry_seconds=0)


def parts_of(step: int, rows: int = 50) -> StateDicts:
    """A network, moments and a queue of a step."""
    weight = torch.randn(rows, 20, generator=torch.Generator().manual_seed(step))
    return {
        "student": {"weight": weight, "bias": weight[:, 0].clone()},
        "optimizer": {"0.step": torch.tensor(float(step)), "0.exp_avg": weight.half()},
        "extra_state": {"pointer": torch.tensor(step), "flags": torch.tensor([True, False, True])},
    }


def meta_of(step: int) -> dict[str, object]:
    """Notes of a step."""
    return {"epoch_means": {"total": step / 3}, "history": [step, "a"]}


def save(folder: Path, step: int, policy: SavePolicy = POLICY) -> Path:
    """Save the checkpoint of a step."""
    return save_checkpoint(folder, step, parts_of(step), meta_of(step), policy=policy)


def loaded_step(folder: Path) -> int:
    """Step of the checkpoint that loads, 0 for none; AssertionError unless it is what was saved,
    to the last bit.
    """
    found = load_latest(folder)
    if found is None:
        return 0
    step, parts, meta = found
    expected = parts_of(step)
    assert parts.keys() == expected.keys() and meta == meta_of(step), (step, meta)
    for part, tensors in expected.items():
        assert parts[part].keys() == tensors.keys()
        for name, value in tensors.items():
            assert parts[part][name].dtype == value.dtype and torch.equal(
                parts[part][name], value
            ), (step, part, name)
    return step


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def only(*steps: int) -> list[str]:
    """Names of the folders of these steps."""
    return [checkpoint_name(step) for step in steps]
