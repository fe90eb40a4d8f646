"""What a row does not say about its pretraining: variant, and deviations from the recipe."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from results.runs import FinishedRun, flatten_config, iter_with_upstream
from results.schema import ResultRow
from results.vocabulary import load_vocabulary

# The three supervisions of Mugs, in the order of `mugs.loss_weights`.
TERMS = ("instance", "local-group", "group")

OPPOSITE = {"weak augmentation": "strong augmentation"}
NO_RECORD = "no record of the run"


@dataclass(frozen=True)
class ReferenceRun:
    """A run of a bundled reproduction; `config` has the settings that can change a result."""

    stage: str
    dataset: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ReferenceReproduction:
    """A bundled reproduction, with which finished runs are compared."""

    recipes: tuple[ReferenceRun, ...]

    def fits(self, row: ResultRow) -> bool:
        """Return whether it pretrains the architecture of a row for as many epochs."""
        configs = [recipe.config for recipe in self.recipes if recipe.stage == "pretrain"]
        return any((c.get("arch"), c.get("epochs")) == (row.arch, row.epochs) for c in configs)


def variant_tags(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return what makes a pretraining another experiment, by the dotted setting that says so."""
    weights = config.get("mugs.loss_weights") or (1.0,) * len(TERMS)
    without = [
        f"w/o {term} supervision"
        for term, weight in zip(TERMS, weights, strict=True)
        if weight == 0
    ]
    found: dict[str, tuple[str, ...]] = {}
    # Other weights than 0 and 1 are not an ablation of the paper; they show as a deviation instead.
    if without and all(weight in (0, 1) for weight in weights):
        found["mugs.loss_weights"] = tuple(without)
    if config.get("views.weak_prob") == 1.0:
        found["views.weak_prob"] = ("weak augmentation",)
    if config.get("views.num_small") == 0:
        found["views.num_small"] = ("two crops",)
    return found


def describe_variant(pretraining: Mapping[str, Any], arch: str) -> str:
    """Return in words what sets a pretraining apart from the main one of its architecture, or "".

    The mini network is always pretrained with weak augmentation: there, strong augmentation is the
    variant.
    """
    default = load_vocabulary().default_variants.get(arch, ())
    tags = variant_tags(flatten_config(pretraining))
    names = [name for group in tags.values() for name in group]
    # An architecture that is always pretrained with a variant is special without it.
    missing = [OPPOSITE[name] for name in default if name not in names]
    return ", ".join([name for name in names if name not in default] + missing)


def find_deviations(
    row: ResultRow,
    runs: Mapping[str, FinishedRun],
    references: Iterable[ReferenceReproduction],
) -> tuple[str, ...]:
    """Return the settings in which a row's run, or a run it needs, differs from the bundled recipe.

    Compares with the recipes of the row's architecture and epochs, for each run with those of its
    stage and data set. Settings that the variant or the row already tells are left out. Without a
    recipe there is nothing to compare with, and nothing is returned.
    """
    recipes = [recipe for found in references if found.fits(row) for recipe in found.recipes]
    deviations: list[str] = []
    for run in iter_with_upstream(row.run_id, runs):
        mine = run.science()
        skipped = _told_elsewhere(run, row)
        candidates = [
            list_differences(mine, flatten_config(recipe.config), skipped, run.stage)
            for recipe in recipes
            if _is_alike(recipe, run, row)
        ]
        # Several recipes may evaluate on the same data set; the run is meant to be the closest one.
        closest: list[str] = min(candidates, key=len, default=[])
        deviations += closest
    return tuple(deviations)


def _is_alike(recipe: ReferenceRun, run: FinishedRun, row: ResultRow) -> bool:
    """Return whether a recipe is about a run's stage and data set.

    An evaluation takes its data set from its input, so its row names it. A run before it without a
    setting `dataset` (a pretraining) is compared with the recipe on any data set.
    """
    default = row.dataset if run.run_id == row.run_id else recipe.dataset
    return (recipe.stage, recipe.dataset) == (run.stage, run.config.get("dataset", default))


def _told_elsewhere(run: FinishedRun, row: ResultRow) -> set[str]:
    """Return the settings about which the row's method, seed or variant already tells."""
    # The seed is a column of the row, and the variant has a place in the table.
    if run.stage == "pretrain":
        return {"seed", *variant_tags(run.science())}
    told = {"(initialisation)": {"weights"}, "(scratch)": {"weights", "seed"}}
    return told.get(row.method.rpartition(" ")[2], set())


def list_differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], skipped: Iterable[str], stage: str
) -> list[str]:
    """Return `pretrain.precision=bf16 (recipe: fp32)` for each setting with different values.

    Settings that only one side has belong to another version of the code and are not compared.
    """
    return [
        f"{stage}.{key}={format_setting(mine[key])} (recipe: {format_setting(theirs[key])})"
        for key in sorted((mine.keys() & theirs.keys()) - set(skipped))
        if mine[key] != theirs[key]
    ]


def format_setting(value: Any) -> str:
    """Return the value of a setting in few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_setting(item) for item in value)}]"
    return "none" if value is None else str(value)
