"""Read reproductions from YAML, apply overrides, and check them against the stages' settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import reading
from pipeline.joining import LONGEST_CHAIN, join_runs
from pipeline.reading import format_choices, parse_yaml, validate_model
from pipeline.seeds import SeedPlan, check_seeds
from pipeline.spec import ConfigError, Resources, StageConfig, StageSpec, is_plain_name

RESERVED = ("stage", "like", "needs", "resources", "seeds")
_RECIPES = "configs/recipes"
_TOP = ("name", "description", "include", "all_of", "seeds", "runs")


@dataclass(frozen=True)
class RunConfig:
    """One run of a reproduction; `needs` maps each role to the name of the run that fills it."""

    name: str
    spec: StageSpec
    config: StageConfig
    needs: Mapping[str, str]
    resources: Resources
    # Its name in the file that it is from; the run's folder has it (`all_of` may rename runs).
    own_name: str
    # Its name in this reproduction, without the seed that `pipeline.seeds` adds.
    written_name: str = ""
    # Seeds with which it is repeated.
    seeds: tuple[int, ...] = ()
    # The same run without --set; None if no --set changes it.
    as_written: "RunConfig | None" = None


@dataclass(frozen=True)
class Reproduction:
    """A checked reproduction; `source` is the file it was read from."""

    name: str
    source: str
    runs: Mapping[str, RunConfig]
    description: str = ""
    # Whether it is made of others (`all_of`), which may have the same run under two names.
    joined: bool = False


def list_bundled() -> list[str]:
    """Return the names of the reproductions that come with the package."""
    return reading.list_bundled_yaml("pipeline", "configs")


def find_reproduction(name_or_path: str) -> tuple[str, str]:
    """Return the source and the text of a reproduction.

    Raises:
        ConfigError: there is none of that name.
    """
    return reading.find_yaml(name_or_path, "pipeline", "configs", what="reproduction")


def load_reproduction(
    name_or_path: str,
    stages: Mapping[str, StageSpec],
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Reproduction:
    """Read and check a reproduction.

    Each override is `run.key[.key]=value`; the value is parsed as YAML. `seeds` take the place of
    those that the file gives.

    Raises:
        ConfigError: names file or override, key, and what is expected.
    """
    found = read_reproduction(name_or_path)
    source, runs = found.source, found.runs
    written = {str(name): merge_likeness(source, name, runs) for name in runs}
    apply_overrides(runs, overrides)
    whole = {name: merge_likeness(source, name, runs) for name in written}
    checked = {
        name: replace(
            _check_run(source, name, raw, stages, overrides),
            own_name=found.origins[name][1] if name in found.origins else name,
        )
        for name, raw in whole.items()
    }
    for name, raw in written.items():
        if raw != whole[name]:
            checked[name] = _compare_with_file(source, checked[name], raw, stages)
    checked = _repeat_with_seeds(found, checked, seeds)
    description = " ".join(str(found.document.get("description", "")).split())
    name = str(found.document.get("name", Path(source).stem))
    return Reproduction(name, source, checked, description, joined=bool(found.origins))


def _repeat_with_seeds(
    found: "UncheckedReproduction", runs: dict[str, RunConfig], seeds: Sequence[int]
) -> dict[str, RunConfig]:
    """Return the runs for each seed of the command line, the file, or the run."""
    source = found.source
    if not seeds and "seeds" in found.document:
        seeds = check_seeds(found.document["seeds"], f"{source}: seeds")
    if not seeds and not any(run.seeds for run in runs.values()):
        return runs
    return SeedPlan(source, runs, seeds).repeat()


@dataclass(frozen=True)
class UncheckedReproduction:
    """A reproduction as YAML has it: its top level, and its runs with those that it takes.

    `origins` are the reproduction, and the name there, of each run that `all_of` takes.
    """

    source: str
    document: dict[str, Any]
    runs: dict[str, Any]
    origins: Mapping[str, tuple[str, str]]


def read_reproduction(name_or_path: str, outer: Sequence[str] = ()) -> UncheckedReproduction:
    """Return the unchecked runs of a reproduction; those of others come first.

    `include` maps another reproduction to the names of the runs that are taken from it unchanged.
    `all_of` lists reproductions of which every run is taken (`pipeline.joining`). `outer` are the
    sources that include this one.
    """
    source, text = find_reproduction(name_or_path)
    document = _parse_document(source, text)
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected a mapping with the keys {', '.join(_TOP)}")
    for key in document:
        if key not in _TOP:
            raise ConfigError(f"{source}: unknown key {key!r}{format_choices(key, _TOP)}")
    # Before its own includes are read: a circle would be followed without end.
    if source in outer:
        raise ConfigError(f"reproductions include each other: {' -> '.join([*outer, source])}")
    joined, origins = _read_all_of(source, document, outer)
    own = document.get("runs", {} if joined else None)
    if not isinstance(own, dict) or not (own or joined):
        raise ConfigError(
            f"{source}: runs: expected a mapping from run names to their stage and settings"
        )
    included = document.get("include") or {}
    if not isinstance(included, dict) or not all(
        isinstance(names, list) for names in included.values()
    ):
        raise ConfigError(
            f"{source}: include: expected a mapping from reproductions to lists of their runs"
        )
    runs = _read_included_runs(source, included, outer)
    if twice := sorted(set(runs) & set(joined)):
        raise ConfigError(f"{source}: include: all_of has a run {twice[0]!r} already")
    runs |= joined
    if twice := sorted(set(runs) & set(own)):
        raise ConfigError(
            f"{source}: runs.{twice[0]}: a run of that name is included; give it another one"
        )
    return UncheckedReproduction(source, document, {**runs, **own}, origins)


# Kept, as reproductions take runs from the same few files. As with recipes, nothing may be changed
# in the mappings.
@cache
def _parse_document(source: str, text: str) -> Any:
    return parse_yaml(source, text)


def _read_all_of(
    source: str, document: Mapping[str, Any], outer: Sequence[str]
) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """Return every run of the reproductions under `all_of`, and where each is from."""
    names = document.get("all_of") or []
    if not isinstance(names, list):
        raise ConfigError(f"{source}: all_of: expected a list of reproductions")
    found = {}
    for name in names:
        there = _read_other(source, "all_of", name, outer)
        if there.origins:
            raise ConfigError(f"{source}: all_of: {name} has all_of itself; list what it has")
        found[str(name)] = there.runs
    return join_runs(found)


def _read_other(source: str, key: str, name: Any, outer: Sequence[str]) -> UncheckedReproduction:
    try:
        found = read_reproduction(str(name), [*outer, source])
    except ConfigError as error:
        # Alone, the message would name a file that the user has not asked for.
        raise ConfigError(f"{source}: {key}: {error}") from None
    if "seeds" in found.document:
        raise ConfigError(
            f"{source}: {key}: {found.source} has seeds for all of its runs, which are not taken;"
            " put seeds into this file, or into its runs"
        )
    return found


def _read_included_runs(
    source: str, included: Mapping[str, Any], outer: Sequence[str]
) -> dict[str, Any]:
    """Return the runs that a reproduction takes from others, by name."""
    runs: dict[str, Any] = {}
    for other, names in included.items():
        there = _read_other(source, "include", other, outer).runs
        for name in names:
            if name in runs:
                raise ConfigError(f"{source}: include.{other}: a run {name!r} is included already")
            if name not in there:
                raise ConfigError(
                    f"{source}: include.{other}: it has no run {name!r}"
                    f"{format_choices(str(name), there)}"
                )
            runs[name] = there[name]
    return runs


def apply_overrides(runs: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set the dotted keys of runs."""
    # A recipe given by --set overrides the file; other --set options override the recipe.
    for override in sorted(overrides, key=lambda text: not _is_likeness(text)):
        apply_override(runs, override)


def apply_override(runs: dict[str, Any], override: str) -> None:
    """Set one dotted key of a run."""
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override}: expected run.key=value")
    if keys[0] not in runs:
        raise ConfigError(
            f"--set {override}: unknown run {keys[0]!r}{format_choices(keys[0], map(str, runs))}"
        )
    if _is_likeness(override):
        _put_recipe_over(runs, keys[0], parse_yaml(f"--set {dotted}", text, anchors=False))
        return
    node = runs
    for key in keys[:-1]:
        below = node.get(key)
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {key} is {below!r}, not a mapping")
        # A copy: with YAML anchors, other runs may share this mapping.
        node[key] = dict(below or {})
        node = node[key]
    value = parse_yaml(f"--set {dotted}", text, anchors=False)
    # As with `like`, a mapping sets only the keys that it has. An empty one stands for defaults.
    node[keys[-1]] = _merged(node.get(keys[-1]), value) if value else value


def _is_likeness(override: str) -> bool:
    """Return whether an override names what a run is `like`."""
    key = override.partition("=")[0].strip()
    # Only of the run itself: deeper down, `like` would be an ordinary (and unknown) setting.
    return key.count(".") == 1 and key.endswith(".like")


def _put_recipe_over(runs: dict[str, Any], name: str, likes: Any) -> None:
    """Put the recipe of `--set run.like=` over the settings that the file gives a run."""
    # The settings of the file become a run of their own. Its name cannot clash: it has blanks.
    before = f"{name} as written"
    runs[before] = runs[name]
    runs[name] = {"like": [before, *(likes if isinstance(likes, list) else [likes])]}


# Kept, because the runs of a plan are like the same few recipes. All share these mappings, so
# nothing may be changed in them; `_merged` makes new ones.
@cache
def _read_recipes(file: str) -> dict[str, Any]:
    """Return the recipes of a bundled file, settings by name."""
    source, text = reading.find_yaml(file, "pipeline", _RECIPES, what="recipe file")
    recipes: dict[str, Any] = parse_yaml(source, text)
    return recipes


def list_recipe_files() -> list[str]:
    """Return the names of the bundled files with recipes."""
    return reading.list_bundled_yaml("pipeline", _RECIPES)


def list_recipes(file: str) -> list[str]:
    """Return the names of a file's recipes, as `like` takes them."""
    return [f"{file}/{key}" for key in _read_recipes(file)]


def load_recipe(name: str) -> dict[str, Any]:
    """Return the settings of a bundled recipe, "file/name", e.g. "linear/s800"."""
    return dict(merge_likeness("recipes", name, {}))


def load_recipe_as_written(name: str) -> dict[str, Any]:
    """Return what a bundled recipe says itself, without the recipes that it is `like`."""
    file, _, recipe = name.partition("/")
    return dict(_read_recipes(file)[recipe])


def merge_likeness(
    source: str,
    name: str,
    runs: Mapping[str, Any],
    inner: Sequence[str] = (),
    known: dict[Any, Any] | None = None,
) -> Any:
    """Return a run's settings, put over those of the runs and recipes that it is `like`.

    Later ones override earlier ones. Nested mappings are merged key by key. `inner` are the names
    that led here. `known` are results: if each run is like two others, the number of ways doubles
    from run to run.
    """
    known = {} if known is None else known
    if isinstance(name, str) and name in known:
        return known[name]
    raw = _find_settings(source, name, runs, inner)
    if not isinstance(raw, dict) or "like" not in raw:
        return raw
    if len(inner) > LONGEST_CHAIN:
        raise ConfigError(
            f"{source}: runs.{inner[0]}.like: leads over more than {LONGEST_CHAIN} other runs"
        )
    settings: Any = {}
    for other in raw["like"] if isinstance(raw["like"], list) else [raw["like"]]:
        if other in (name, *inner):
            circle = " -> ".join([*inner, name, other])
            raise ConfigError(f"{source}: runs.{name}.like: runs are like each other: {circle}")
        settings = _merged(settings, merge_likeness(source, other, runs, (*inner, name), known))
    known[name] = _merged(settings, {key: value for key, value in raw.items() if key != "like"})
    return known[name]


def _find_settings(source: str, name: Any, runs: Mapping[str, Any], inner: Sequence[str]) -> Any:
    """Return the settings of a run, or of a recipe, whose name has a slash."""
    if isinstance(name, str) and name in runs:
        return runs[name]
    # A run's name cannot have a slash, so the two kinds of names never meet.
    file, slash, recipe = str(name).partition("/")
    where = f"{source}: runs.{inner[-1]}.like" if inner else source
    if not slash:
        raise ConfigError(f"{where}: no run {name!r}{format_choices(str(name), map(str, runs))}")
    known = [each for file_name in list_recipe_files() for each in list_recipes(file_name)]
    if name not in known:
        raise ConfigError(f"{where}: no recipe {name!r}{format_choices(str(name), known)}")
    return _read_recipes(file)[recipe]


def _merged(base: Any, own: Any) -> Any:
    # Lists are settings of their own and are replaced, not joined.
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    return {**base, **{key: _merged(base.get(key), value) for key, value in own.items()}}


def _compare_with_file(
    source: str, run: RunConfig, written: Any, stages: Mapping[str, StageSpec]
) -> RunConfig:
    """Return a run that --set changed, with what the file says beside it."""
    try:
        as_written = _check_run(source, run.name, written, stages, ())
    except ConfigError:
        # The file alone may be incomplete; then there is nothing to compare with.
        return run
    return replace(run, as_written=as_written)


def _resources_from_command_line(name: str, overrides: Sequence[str]) -> list[str]:
    """Return which resources of a run are set by --set, one by one or as a mapping."""
    found: list[str] = []
    for override in overrides:
        dotted, _, text = override.partition("=")
        keys = dotted.strip().split(".")
        if keys[:2] == [name, "resources"]:
            # `resources=` without a value gives back those of the stage.
            found += keys[2:] or parse_yaml(f"--set {dotted}", text, anchors=False) or ()
    return found


def _check_run(
    source: str, name: str, raw: Any, stages: Mapping[str, StageSpec], overrides: Sequence[str]
) -> RunConfig:
    where = f"{source}: runs.{name}"
    if not isinstance(raw, dict) or "stage" not in raw:
        raise ConfigError(
            f"{where}: expected a mapping with the key 'stage'{format_choices('', stages)}"
        )
    # The name becomes part of a folder's name and of a Slurm job's name.
    if not is_plain_name(name):
        raise ConfigError(
            f"{where}: a run's name may hold letters, digits, '_', '-' and '.', and begins with a "
            "letter, a digit or '_'"
        )
    spec = stages.get(raw["stage"]) if isinstance(raw["stage"], str) else None
    if spec is None:
        raise ConfigError(
            f"{where}.stage: unknown stage {raw['stage']!r}"
            f"{format_choices(str(raw['stage']), stages)}"
        )
    needs = {} if raw.get("needs") is None else raw["needs"]
    if not isinstance(needs, dict) or not all(isinstance(v, str) for v in needs.values()):
        raise ConfigError(f"{where}.needs: expected a mapping from roles to run names")
    given = {} if raw.get("resources") is None else raw["resources"]
    if not isinstance(given, dict):
        raise ConfigError(
            f"{where}.resources: expected a mapping{format_choices('', Resources.model_fields)}"
        )
    # What is not given is as the stage declares it, not as `Resources` has it by default.
    merged = {**spec.resources.model_dump(), **given}
    found = validate_model(Resources, merged, f"{where}.resources", f"{name}.resources", overrides)
    found = found.mark_from_command_line(_resources_from_command_line(name, overrides))
    fields = {key: value for key, value in raw.items() if key not in RESERVED}
    # Former reproductions say `preset: name`; without this, the message would be "unknown key".
    if "preset" in fields:
        instead = f"like: {spec.name}/{fields['preset']}"
        raise ConfigError(f"{where}.preset: presets are recipes now; write {instead}")
    config = validate_model(spec.config, fields, where, name, overrides, extra_choices=RESERVED)
    seeds = check_seeds(raw["seeds"], f"{where}.seeds") if "seeds" in raw else ()
    if seeds and not config.repeats_with_seed():
        raise ConfigError(
            f"{where}.seeds: a {spec.name!r} run is not repeated on its own; give seeds to the"
            " pretraining that it needs"
        )
    return RunConfig(
        name=name,
        spec=spec,
        config=config,
        needs={str(role): filler for role, filler in needs.items()},
        resources=found,
        own_name=name,
        written_name=name,
        seeds=seeds,
    )
