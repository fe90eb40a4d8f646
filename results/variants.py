"""What a row does not say about its pretraining: variant, and deviations from the recipe."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from results.runs import FinishedRun, flatten_config, group_by, iter_with_upstream
from results.schema import Result, ResultRow
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
        """Return whether it pretrains the row's architecture by its method for as many epochs."""
        configs = [recipe.config for recipe in self.recipes if recipe.stage == "pretrain"]
        method = row.method.partition(" ")[0]
        return any(
            (c.get("method", method), c.get("arch"), c.get("epochs"))
            == (method, row.arch, row.epochs)
            for c in configs
        )


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
    # Runs record `large_crops: own` under its former name.
    weak_only = config.get("views.weak_only", True)
    vocabulary = load_vocabulary()
    method = config.get("method")
    if method in vocabulary.weak_methods and not weak_only:
        found["views.weak_only"] = ("strong augmentation",)
    if config.get("views.num_small") == 0 and method not in vocabulary.two_crop_methods:
        found["views.num_small"] = ("two crops",)
    return found


def describe_variant(pretraining: Mapping[str, Any], arch: str) -> str:
    """Return in words what sets a pretraining apart from the main one of its architecture, or "".

    An experiment of the user's own has the name that its reproduction gives it, in parentheses.

    The mini network is always pretrained with weak augmentation: there, strong augmentation is the
    variant.
    """
    default = load_vocabulary().default_variants.get(arch, ())
    tags = variant_tags(flatten_config(pretraining))
    names = [name for group in tags.values() for name in group]
    if own := pretraining.get("variant"):
        names.append(f"({own})")
    # An architecture that is always pretrained with a variant is special without it.
    missing = [
        OPPOSITE[name] for name in default if name not in names and OPPOSITE[name] not in names
    ]
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


def distinguish_unlike(results: Sequence[Result], runs: Mapping[str, FinishedRun]) -> list[Result]:
    """Return the results; those that only look alike now say in which settings they differ.

    Seeds are averaged, so results of the same experiment must be equal in every setting of their
    run and of the runs it needs, but for the seed that the row tells. Where no recipe shows the
    difference (it has other epochs, or is the user's own), it is found by comparison.
    """
    # Runs before the evaluation: all its rows get the same name, whatever their setting.
    named = _name_varying(results, runs, _experiment, own=False)
    # The evaluation itself: a row chooses the best of several settings that it states, so only
    # rows with the same statement are compared.
    return _name_varying(named, runs, _experiment_and_setting, own=True)


def _experiment(result: Result) -> tuple[object, ...]:
    row = result.row
    about = (row.method, row.arch, row.epochs, row.stage, row.dataset)
    return *about, result.variant, result.differs, result.imported


def _experiment_and_setting(result: Result) -> tuple[object, ...]:
    return *_experiment(result), result.row.metric, result.row.setting


def _name_varying(
    results: Sequence[Result],
    runs: Mapping[str, FinishedRun],
    experiment: Callable[[Result], tuple[object, ...]],
    *,
    own: bool,
) -> list[Result]:
    """Return the results, each with the settings in which its group varies."""
    varying: dict[tuple[tuple[object, ...], str], tuple[str, ...]] = {}
    for group, same in group_by(results, experiment).items():
        ids = sorted({result.row.run_id for result in same if result.row.run_id in runs})
        chains = {run_id: _chain_settings(run_id, same[0].row, runs, own=own) for run_id in ids}
        # Settings that only some have belong to another version of the code.
        common = set.intersection(*(set(chain) for chain in chains.values())) if chains else set()
        changing = [k for k in sorted(common) if len({repr(c[k]) for c in chains.values()}) > 1]
        for run_id, chain in chains.items():
            varying[group, run_id] = tuple(
                f"{key[0]}={format_setting(chain[key])}" for key in changing
            )
    return [
        replace(
            result,
            differs=(*result.differs, *varying.get((experiment(result), result.row.run_id), ())),
        )
        for result in results
    ]


def _chain_settings(
    run_id: str, row: ResultRow, runs: Mapping[str, FinishedRun], *, own: bool
) -> dict[tuple[str, int], Any]:
    """Return the settings of a run (`own`), or of those it needs.

    The key is the name of the setting, and which run of its stage has it: the nearest is 0.
    """
    found = {}
    places: Counter[str] = Counter()
    for run in iter_with_upstream(run_id, runs):
        place = places[run.stage]
        places[run.stage] += 1
        if own != (run.run_id == run_id):
            continue
        skipped = _told_elsewhere(run, row)
        for key, value in run.science().items():
            if key not in skipped:
                found[f"{run.stage}.{key}", place] = value
    return found


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
