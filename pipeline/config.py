"""Reproductions: YAML by bundled name or path, with overrides, checked against the stages' configurations."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.spec import ConfigError, Resources, StageConfig, StageSpec

RESERVED = ("stage", "like", "needs", "resources")
_Model = TypeVar("_Model", bound=BaseModel)
_DEEPEST = 200
_MERGE = "tag:yaml.org,2002:merge"
_TOP = ("name", "description", "include", "runs")


@dataclass(frozen=True)
class RunConfig:
    """One run of a reproduction; `needs` maps each role to the name of the run that fills it."""

    name: str
    spec: StageSpec
    config: StageConfig
    needs: Mapping[str, str]
    resources: Resources


@dataclass(frozen=True)
class Reproduction:
    """A checked reproduction; `source` is the file it was read from."""

    name: str
    source: str
    runs: Mapping[str, RunConfig]
    description: str = ""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice in one mapping."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            twice = f"key {key!r} is written twice"
            raise yaml.constructor.ConstructorError(None, None, twice, key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def hint(key: str, known: Iterable[str]) -> str:
    """Text naming the closest valid choice, if any, and all of them."""
    names = sorted(known)
    guess = difflib.get_close_matches(str(key), names, n=1)
    close = f"; did you mean {guess[0]!r}?" if guess else ""
    return f"{close} (valid: {', '.join(names) or 'none'})"


def bundled() -> list[str]:
    """Names of the reproductions that come with the package."""
    folder = resources.files("pipeline") / "configs"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find(name_or_path: str) -> tuple[str, str]:
    """Source name and text of a reproduction; ConfigError when there is none of that name."""
    if name_or_path in bundled():
        file = resources.files("pipeline") / "configs" / f"{name_or_path}.yaml"
        return f"{name_or_path}.yaml", file.read_text(encoding="utf-8")
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return str(path), read_text(path)
    choices = hint(name_or_path, bundled())
    raise ConfigError(f"no reproduction {name_or_path!r}: neither a file nor bundled{choices}")


def read_text(path: Path) -> str:
    """Text of a file; ConfigError naming it when it cannot be read or holds something else."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None


def parse_yaml(source: str, text: str) -> Any:
    """YAML content; ConfigError with file, line and column where it is malformed."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:  # the parser would take time that grows with the square of it
        raise ConfigError(f"{source}: not valid YAML: more than {_DEEPEST} brackets inside each other")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def load(name_or_path: str, stages: Mapping[str, StageSpec], overrides: Sequence[str] = ()) -> Reproduction:
    """Read and check a reproduction; each override is `run.key[.key]=value`, its value parsed as YAML."""
    source, document, runs = read(name_or_path)
    changed = [apply_override(runs, override, what="run") for override in overrides]
    default_name = Path(source).stem
    whole = {str(name): _with_likeness(source, name, runs) for name in runs}
    checked = {name: _check_run(source, name, raw, stages, changed) for name, raw in whole.items()}
    description = " ".join(str(document.get("description", "")).split())
    return Reproduction(str(document.get("name", default_name)), source, checked, description)


def read(name_or_path: str, outer: Sequence[str] = ()) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Source name, document and runs of a reproduction, unchecked; runs it includes come first.

    `include` maps another reproduction to the names of the runs that are taken from it, as they are there.
    """
    source, text = find(name_or_path)
    document = parse_yaml(source, text)
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected a mapping with the keys {', '.join(_TOP)}")
    for key in document:
        if key not in _TOP:
            raise ConfigError(f"{source}: unknown key {key!r}{hint(key, _TOP)}")
    if source in outer:
        raise ConfigError(f"reproductions include each other: {' -> '.join([*outer, source])}")
    own = document.get("runs")
    if not isinstance(own, dict) or not own:
        raise ConfigError(f"{source}: runs: expected a mapping from run names to their stage and settings")
    included = document.get("include") or {}
    if not isinstance(included, dict) or not all(isinstance(names, list) for names in included.values()):
        raise ConfigError(f"{source}: include: expected a mapping from reproductions to lists of their runs")
    runs: dict[str, Any] = {}
    for other, names in included.items():
        try:
            there = read(str(other), [*outer, source])[2]
        except ConfigError as error:
            raise ConfigError(f"{source}: include: {error}") from None
        for name in names:
            if name in runs:
                raise ConfigError(f"{source}: include.{other}: a run {name!r} is included already")
            if name not in there:
                raise ConfigError(f"{source}: include.{other}: it has no run {name!r}{hint(str(name), there)}")
            runs[name] = there[name]
    if twice := sorted(set(runs) & set(own)):
        raise ConfigError(f"{source}: runs.{twice[0]}: a run of that name is included; give it another one")
    return source, document, {**runs, **own}


def apply_override(tree: dict[str, Any], override: str, *, what: str) -> str:
    """Set one dotted key of a tree in place and return the key; the first part must exist in the tree."""
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override}: expected {what}.key=value")
    if keys[0] not in tree:
        raise ConfigError(f"--set {override}: unknown {what} {keys[0]!r}{hint(keys[0], map(str, tree))}")
    node: Any = tree
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            if node.get(key) is not None:
                raise ConfigError(f"--set {override}: {key} is {node[key]!r}, not a mapping")
            node[key] = {}
        node = node[key]
    node[keys[-1]] = parse_yaml(f"--set {dotted}", text)
    return dotted.strip()


def _with_likeness(source: str, name: str, runs: Mapping[str, Any], inner: Sequence[str] = ()) -> Any:
    """A run's settings, over those of the run that it is `like`: nested mappings are merged key by key."""
    raw = runs[name]
    if not isinstance(raw, dict) or "like" not in raw:
        return raw
    other, where = raw["like"], f"{source}: runs.{name}.like"
    if not isinstance(other, str) or other not in runs:
        raise ConfigError(f"{where}: no run {other!r}{hint(str(other), map(str, runs))}")
    if other in (name, *inner):
        raise ConfigError(f"{where}: runs are like each other: {' -> '.join([*inner, name, other])}")
    own = {key: value for key, value in raw.items() if key != "like"}
    return _merged(_with_likeness(source, other, runs, (*inner, name)), own)


def _merged(base: Any, own: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    return {**base, **{key: _merged(base.get(key), value) for key, value in own.items()}}


def _check_run(source: str, name: str, raw: Any, stages: Mapping[str, StageSpec], changed: Sequence[str]) -> RunConfig:
    where = f"{source}: runs.{name}"
    if not isinstance(raw, dict) or "stage" not in raw:
        raise ConfigError(f"{where}: expected a mapping with the key 'stage'{hint('', stages)}")
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise ConfigError(f"{where}: a run's name may hold letters, digits, '_', '-' and '.'")
    spec = stages.get(raw["stage"]) if isinstance(raw["stage"], str) else None
    if spec is None:
        raise ConfigError(f"{where}.stage: unknown stage {raw['stage']!r}{hint(str(raw['stage']), stages)}")
    needs = raw.get("needs") or {}
    if not isinstance(needs, dict) or not all(isinstance(v, str) for v in needs.values()):
        raise ConfigError(f"{where}.needs: expected a mapping from roles to run names")
    given = raw.get("resources") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}.resources: expected a mapping{hint('', Resources.model_fields)}")
    merged = {**spec.resources.model_dump(), **given}
    found = validate(Resources, merged, f"{where}.resources", f"{name}.resources", changed)
    fields = {key: value for key, value in raw.items() if key not in RESERVED}
    config = validate(spec.config, fields, where, name, changed, extra_choices=RESERVED)
    return RunConfig(name, spec, config, {str(k): v for k, v in needs.items()}, found)


def validate(
    model: type[_Model],
    values: Mapping[str, Any],
    where: str,
    dotted: str = "",
    changed: Sequence[str] = (),
    *,
    extra_choices: Sequence[str] = (),
) -> _Model:
    """Build a model, or raise ConfigError with file (or --set), key and what was expected."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False)
    first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    full = f"{dotted}.{key}" if dotted else key
    by_set = next((c for c in changed if full == c or full.startswith(f"{c}.")), None)
    place = f"--set {by_set}" if by_set else where
    if first["type"] == "extra_forbidden":
        known = [*_fields_at(model, location[:-1]), *(extra_choices if len(location) == 1 else ())]
        prefix = "" if by_set or len(location) == 1 else f".{'.'.join(location[:-1])}"
        raise ConfigError(f"{place}{prefix}: unknown key {location[-1]!r}{hint(location[-1], known)}")
    if first["type"] == "missing":
        raise ConfigError(f"{place}: key {key!r} is missing")
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    head = place if by_set or not key else f"{place}.{key}"
    raise ConfigError(f"{head}: expected {expected}, got {first['input']!r}")


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Field names of the model reached by a location, through nested models and optional ones."""
    current: Any = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
        info = current.model_fields.get(part)
        options = [info.annotation, *typing.get_args(info.annotation)] if info else []
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not models:
            return []
        current = models[0]
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []
