"""YAML, bundled or a user's: found, parsed and checked against models; errors say where, what and what is right."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.spec import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)
_DEEPEST = 200
_MERGE = "tag:yaml.org,2002:merge"


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


def format_choices(key: str, known: Iterable[str]) -> str:
    """Text naming the closest valid choice, if any, and all of them."""
    names = sorted(known)
    guess = difflib.get_close_matches(str(key), names, n=1)
    close = f"; did you mean {guess[0]!r}?" if guess else ""
    return f"{close} (valid: {', '.join(names) or 'none'})"


def list_bundled(package: str, folder: str) -> list[str]:
    """Names of the YAML files that come with a package."""
    names = [path.name for path in (resources.files(package) / folder).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_yaml(name_or_path: str, package: str, folder: str, *, what: str) -> tuple[str, str]:
    """Source and text of a bundled file or of one of the user's; ConfigError when there is none of that name."""
    names = list_bundled(package, folder)
    if name_or_path in names:
        source = f"{name_or_path}.yaml"
        return source, (resources.files(package) / folder / source).read_text(encoding="utf-8")
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return str(path), read_config_text(path)
    raise ConfigError(
        f"no {what} {name_or_path!r}: neither a file nor bundled{format_choices(name_or_path, names)}"
    )


def read_config_text(path: Path) -> str:
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
        raise ConfigError(
            f"{source}: not valid YAML: more than {_DEEPEST} brackets inside each other"
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    # PyYAML lets these slip for scalars that do not fit their tag, such as "!!bool x" and "\UFFFFFFFF".
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def validate_model(
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
        raise ConfigError(
            f"{place}{prefix}: unknown key {location[-1]!r}{format_choices(location[-1], known)}"
        )
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
        models = [
            option
            for option in options
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
        if not models:
            return []
        current = models[0]
    return (
        list(current.model_fields)
        if isinstance(current, type) and issubclass(current, BaseModel)
        else []
    )
