"""What a row does not say of its pretraining: which variant of the method it is, and what differs from the recipe."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from results.runs import FinishedRun, flatten_config, iter_with_upstream
from results.schema import ResultRow
from results.vocabulary import load_vocabulary

TERMS = ("instance", "local-group", "group")
OPPOSITE = {"weak augmentation": "strong augmentation"}
NO_RECORD = "no record of the run"


@dataclass(frozen=True)
class ReferenceRun:
    """A run of a recipe: its stage, the data set it is about, and its configuration (science fields only)."""

    stage: str
    dataset: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ReferenceReproduction:
    """The runs of a reproduction, to compare with."""

    name: str
    recipes: tuple[ReferenceRun, ...]

    def fits(self, row: ResultRow) -> bool:
        """Whether it pretrains a row's architecture for as many epochs."""
        configs = [recipe.config for recipe in self.recipes if recipe.stage == "pretrain"]
        return any((c.get("arch"), c.get("epochs")) == (row.arch, row.epochs) for c in configs)


def variant_tags(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names of what makes a pretraining another experiment, by the (dotted) field of its configuration that says so."""
    weights = config.get("mugs.loss_weights") or (1.0,) * len(TERMS)
    without = tuple(
        f"w/o {term} supervision"
        for term, weight in zip(TERMS, weights, strict=True)
        if weight == 0
    )
    found: dict[str, tuple[str, ...]] = {}
    if without and all(weight in (0, 1) for weight in weights):
        found["mugs.loss_weights"] = without
    if config.get("views.weak_prob") == 1.0:
        found["views.weak_prob"] = ("weak augmentation",)
    if config.get("views.num_small") == 0:
        found["views.num_small"] = ("two crops",)
    return found


def describe_variant(pretraining: Mapping[str, Any], arch: str) -> str:
    """What sets a pretraining apart from the main one of its architecture, in words; empty for the main one.

    The mini network is always pretrained with weak augmentation: there the strong one is the variant.
    """
    usual = load_vocabulary().default_variants.get(arch, ())
    names = [name for part in variant_tags(flatten_config(pretraining)).values() for name in part]
    missing = [OPPOSITE[name] for name in usual if name not in names]
    return ", ".join([name for name in names if name not in usual] + missing)


def find_deviations(
    row: ResultRow, runs: Mapping[str, FinishedRun], references: Iterable[ReferenceReproduction]
) -> tuple[str, ...]:
    """Settings in which a row's run, or one it needs, differs from the recipes of its architecture and epochs.

    Of several recipes for a stage and data set, the closest counts. Fields that name the variant are not told, nor is
    the seed of the row. Nothing without a recipe.
    """
    recipes = [
        recipe for reference in references if reference.fits(row) for recipe in reference.recipes
    ]
    found: list[str] = []
    for run in iter_with_upstream(row.run_id, runs):
        mine, skip = run.science(), _skipped(run, row)
        theirs = [flatten_config(recipe.config) for recipe in recipes if _alike(recipe, run, row)]
        candidates = [list_differences(mine, other, skip, run.stage) for other in theirs]
        if candidates:
            fewest: list[str] = min(candidates, key=len)
            found += fewest
    return tuple(found)


def _alike(recipe: ReferenceRun, run: FinishedRun, row: ResultRow) -> bool:
    """Whether a recipe is about a run's stage and data set; what comes before the row's run has only its own word."""
    own = run.config.get("dataset", row.dataset if run.run_id == row.run_id else recipe.dataset)
    return (recipe.stage, recipe.dataset) == (run.stage, own)


def _skipped(run: FinishedRun, row: ResultRow) -> set[str]:
    """Fields of which the row's method, seed or variant already tells."""
    if run.stage == "pretrain":
        return {"seed", *variant_tags(run.science())}
    told = {"(initialisation)": {"weights"}, "(scratch)": {"weights", "seed"}}
    return told.get(row.method.rpartition(" ")[2], set())


def list_differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], skip: Iterable[str], stage: str
) -> list[str]:
    """`pretrain.precision=bf16 (recipe: fp32)` for every field both have with different values."""
    left_out = set(skip)
    shared = [
        key
        for key in sorted(mine)
        if key in theirs and key not in left_out and mine[key] != theirs[key]
    ]
    return [
        f"{stage}.{key}={format_setting(mine[key])} (recipe: {format_setting(theirs[key])})"
        for key in shared
    ]


def format_setting(value: Any) -> str:
    """A setting in few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_setting(item) for item in value)}]"
    return "none" if value is None else str(value)
