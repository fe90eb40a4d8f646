"""The names that result rows may use, and how tables show them (`specs/vocabulary.yaml`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from pydantic import TypeAdapter

from results.resources import read_yaml


@dataclass(frozen=True)
class Vocabulary:
    """Names that the tables know."""

    # Titles by name.
    archs: Mapping[str, str]
    methods: Mapping[str, str]
    datasets: Mapping[str, str]
    # Images that an evaluation counts, by data set.
    evaluation_images: Mapping[str, int]
    # Metrics that are the share of images with a right answer.
    image_shares: tuple[str, ...]
    stages: tuple[str, ...]
    # Parts of settings in words, by stage; `*` stands for any text.
    setting_parts: Mapping[str, Mapping[str, str]]
    # The smallest and the largest possible value.
    units: Mapping[str, tuple[float, float]]
    # The unit that a metric must have; None for any.
    metrics: Mapping[str, str | None]
    # Variants in which an architecture is always pretrained, so that they are not worth naming.
    default_variants: Mapping[str, tuple[str, ...]]
    # Methods whose student usually sees the teacher's large crops and weak crops only.
    weak_methods: tuple[str, ...]
    # Methods that always have two crops.
    two_crop_methods: tuple[str, ...]

    def arch_title(self, name: str) -> str:
        """Return `ViT-S/16` for vit_s16; an unknown name is returned as it is."""
        return self.archs.get(name, name)

    def method_title(self, name: str) -> str:
        """Return `Mugs (initialisation)` for `mugs (initialisation)`."""
        first, space, rest = name.partition(" ")
        return f"{self.methods.get(first, first)}{space}{rest}"

    def dataset_title(self, name: str) -> str:
        """Return the title of a data set, also of one derived from a known one (`<known>_...`)."""
        parents = [known for known in self.datasets if name.startswith(f"{known}_")]
        if name in self.datasets or not parents:
            return self.datasets.get(name, name)
        parent = max(parents, key=len)
        return f"{self.datasets[parent]}: {name.removeprefix(parent + '_').replace('_', ' ')}"

    def describe_setting(self, stage: str, setting: str) -> str:
        """Return `best of 16 classifiers, no augmentation` for `best of 16, none` of a stage."""
        words = self.setting_parts.get(stage, {})
        return ", ".join(_describe_part(part, words) for part in setting.split(", "))

    def knows_dataset(self, name: str) -> bool:
        """Return whether a data set is listed, or made from the mini data set."""
        return name in self.datasets or name.startswith("sklearn_digits_")


def _describe_part(part: str, words: Mapping[str, str]) -> str:
    for pattern, text in words.items():
        start, star, _ = pattern.partition("*")
        if part == pattern or (star and part.startswith(start)):
            return text.replace("*", part.removeprefix(start))
    return part


def describe_setting(stage: str, setting: str) -> str:
    """Return the setting of a result row in words, as tables show it; files keep its own text."""
    return load_vocabulary().describe_setting(stage, setting)


@cache
def load_vocabulary() -> Vocabulary:
    """Return the vocabulary."""
    return TypeAdapter(Vocabulary).validate_python(read_yaml("specs", "vocabulary.yaml"))
