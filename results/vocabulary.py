"""The names that result rows may use, and how tables show them (`specs/vocabulary.yaml`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from results.resources import read_yaml


@dataclass(frozen=True)
class Vocabulary:
    """Names known to the tables; `units` have the least and the greatest value, `metrics` a unit or None."""

    archs: Mapping[str, str]
    methods: Mapping[str, str]
    datasets: Mapping[str, str]
    stages: tuple[str, ...]
    units: Mapping[str, tuple[float, float]]
    metrics: Mapping[str, str | None]
    default_variants: Mapping[str, tuple[str, ...]]

    def arch_title(self, name: str) -> str:
        """`ViT-S/16` for vit_s16; an unknown one as it is."""
        return self.archs.get(name, name)

    def method_title(self, name: str) -> str:
        """`Mugs (initialisation)` for `mugs (initialisation)`; an unknown one as it is."""
        first, space, rest = name.partition(" ")
        return f"{self.methods.get(first, first)}{space}{rest}"

    def dataset_title(self, name: str) -> str:
        """Title of a data set; of one derived from the mini data set too; an unknown one as it is."""
        parents = [known for known in self.datasets if name.startswith(f"{known}_")]
        if name in self.datasets or not parents:
            return self.datasets.get(name, name)
        parent = max(parents, key=len)
        return f"{self.datasets[parent]}: {name.removeprefix(parent + '_').replace('_', ' ')}"

    def knows_dataset(self, name: str) -> bool:
        """Whether it is listed, or derived from the mini data set."""
        return name in self.datasets or name.startswith("sklearn_digits_")


@cache
def load_vocabulary() -> Vocabulary:
    """The one vocabulary."""
    content = read_yaml("specs", "vocabulary.yaml")
    units = {name: (float(low), float(high)) for name, (low, high) in content.pop("units").items()}
    default_variants = {
        arch: tuple(names) for arch, names in content.pop("default_variants").items()
    }
    return Vocabulary(
        **content
        | {"stages": tuple(content["stages"]), "units": units, "default_variants": default_variants}
    )
