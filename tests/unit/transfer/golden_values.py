"""Values that the originals compute (golden/README.md), and their weights under our names."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """The tensors of a part by name, and its `facts`; half precision is read as float32."""

    def __init__(self, part: str) -> None:
        with np.load(FOLDER / f"{part}.npz") as arrays:
            self.tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.facts = read_facts(part) if (FOLDER / f"{part}.json").exists() else None

    def __getitem__(self, name: str) -> Tensor:
        value = self.tensors[name]
        return value.float() if value.dtype == torch.float16 else value

    def maps(self, num: int = 4) -> list[Tensor]:
        """Return the input maps, finest first."""
        return [self[f"input.map{level}"] for level in range(num)]

    def load(self, module: nn.Module, prefix: str, names: dict[str, str]) -> None:
        """Load the weights below `prefix`; `names` maps patterns of the originals' to ours."""
        state = {
            rename(name, prefix, names): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }
        found = module.load_state_dict(state, strict=False)
        assert not found.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)


def rename(name: str, prefix: str, names: dict[str, str]) -> str:
    """Return our name of a weight of the originals."""
    name = name.removeprefix(prefix)
    for pattern, new in names.items():
        name = re.sub(pattern, new, name)
    return name


def read_facts(part: str) -> Any:
    """Return the JSON file of a part."""
    return json.loads((FOLDER / f"{part}.json").read_text())


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest absolute value that is expected."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.abs().max())
