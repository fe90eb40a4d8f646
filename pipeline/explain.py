"""Where each setting of a run comes from: default, recipe, reproduction, command line, profile."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import config
from pipeline.identity import science_fields
from pipeline.settings import Settings, setting_fields, use_current_names
from pipeline.spec import Resources, StageRun, StageSpec

COMMAND_LINE = "command line (--set)"
SEEDS = "--seeds, or seeds of the reproduction"
DEFAULT = "default"


@dataclass(frozen=True)
class ExplainedSetting:
    """A setting of a run, its value, what gave it, and whether it is part of the run id."""

    name: str
    value: Any
    source: str
    in_run_id: bool


@dataclass(frozen=True)
class _Given:
    """A value in a mapping of settings, replaced by what gave it."""

    source: str


def explain_run(
    name_or_path: str,
    stages: Mapping[str, StageSpec],
    run: StageRun,
    overrides: Sequence[str] = (),
    from_profile: Mapping[str, tuple[Any, str]] | None = None,
) -> list[ExplainedSetting]:
    """Return all settings and resources of a planned run.

    `from_profile` has the resources that a cluster profile decides: their value there, and a text
    that names the profile.
    """
    given = _find_sources(name_or_path, run.written_name or run.name, overrides)
    if run.written_name and run.name != run.written_name and run.config.repeats_with_seed():
        given["seed"] = _Given(SEEDS)
    cls = type(run.config)
    fields = {key: value for key, value in given.items() if key not in config.RESERVED}
    named = use_current_names(cls, fields)
    lines = [
        ExplainedSetting("stage", run.stage, _source(given, ["stage"]) or DEFAULT, True),
        *(
            ExplainedSetting(
                f"needs.{role}", need, _source(given, ["needs", role]) or DEFAULT, True
            )
            for role, need in run.needs.items()
        ),
        *_explain_settings(run.config, named, []),
    ]
    return [*lines, *_explain_resources(run, given, stages[run.stage], from_profile or {})]


def _explain_settings(
    settings: Settings, given: Mapping[str, Any], above: Sequence[str]
) -> Iterator[ExplainedSetting]:
    identity = science_fields(settings)
    unused = settings.unused_settings()
    for field in setting_fields(type(settings)).values():
        # Settings of methods that are not chosen, for example.
        if field.name in unused:
            continue
        value = getattr(settings, field.name)
        path = [*above, field.name]
        if isinstance(value, Settings):
            yield from _explain_settings(value, given, path)
            continue
        source = _source(given, path)
        if source is None:
            # What code filled in from other settings or from the inputs differs from the default.
            source = (
                DEFAULT if value == field.default else "filled in from other settings or the inputs"
            )
        yield ExplainedSetting(".".join(path), value, source, field.record_name in identity)


def _explain_resources(
    run: StageRun,
    given: Mapping[str, Any],
    spec: StageSpec,
    from_profile: Mapping[str, tuple[Any, str]],
) -> Iterator[ExplainedSetting]:
    for name in Resources.model_fields:
        value = getattr(run.resources, name)
        source = _source(given, ["resources", name])
        if source is None:
            own = name in spec.resources.model_fields_set
            source = f"default of the stage {spec.name}" if own else DEFAULT
        if name in from_profile:
            value, source = from_profile[name]
        yield ExplainedSetting(f"resources.{name}", value, source, False)


def _source(given: Mapping[str, Any], path: Sequence[str]) -> str | None:
    """Return what gave a setting; None if nothing did."""
    node: Any = given
    for key in path:
        # A value that was given as a whole, such as null, stands for all settings below it.
        if isinstance(node, _Given):
            break
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node.source if isinstance(node, _Given) else None


def _find_sources(name_or_path: str, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a run is given, each value replaced by what gave it."""
    places = _find_places(name_or_path)
    raw = config.read_reproduction(name_or_path).runs
    runs: dict[str, Any] = {
        # A recipe is found among the runs first, and so with its values replaced.
        recipe: _replace_values(config.load_recipe_as_written(recipe), f"recipe {recipe}")
        for file in config.list_recipe_files()
        for recipe in config.list_recipes(file)
    }
    for other, settings in raw.items():
        runs[other] = _replace_values(settings, places[other])
    config.apply_overrides(runs, overrides)
    found = _mark_command_line(config.merge_likeness(name_or_path, name, runs))
    assert isinstance(found, dict)
    return found


def _find_places(name_or_path: str) -> dict[str, str]:
    """Return the file in which each run of a reproduction is written, and its name there."""
    found = config.read_reproduction(name_or_path)
    places = {
        str(name): f"{found.source}: runs.{name}" for name in found.document.get("runs") or {}
    }
    for other, names in (found.document.get("include") or {}).items():
        there = _find_places(str(other))
        places |= {name: there[name] for name in names}
    parts = {other: _find_places(other) for other, _ in found.origins.values()}
    places |= {name: parts[other][run] for name, (other, run) in found.origins.items()}
    return places


def _replace_values(settings: Any, source: str) -> dict[str, Any]:
    # `like` stays: the merging follows it.
    return {
        key: value if key == "like" else _replace(value, source) for key, value in settings.items()
    }


def _replace(value: Any, source: str) -> Any:
    # An empty mapping is a value of its own, as in `sweep: {}`.
    if isinstance(value, Mapping) and value:
        return {key: _replace(inner, source) for key, inner in value.items()}
    return _Given(source)


def _mark_command_line(value: Any) -> Any:
    """Replace what is left: it came in by --set."""
    if isinstance(value, Mapping) and value:
        return {key: _mark_command_line(inner) for key, inner in value.items()}
    return value if isinstance(value, _Given) else _Given(COMMAND_LINE)
