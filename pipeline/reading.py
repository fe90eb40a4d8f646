"""YAML, bundled or a user's: find it, parse it and check it against settings classes.

Every error says where, what is wrong, and what is valid.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.files import expand_home, read_bounded
from pipeline.settings import Settings, setting_fields, use_current_names
from pipeline.spec import ConfigError

_Model = TypeVar("_Model")
_DEEPEST = 200  # far deeper than any configuration
_LONGEST = 256 << 10  # bytes; far longer than any, and parsed in seconds
_MOST_VALUES = 100_000  # far more than any
_LONGEST_NUMBER = 400  # digits; base 60 (`1:30`) takes time that grows with their square
_MOST_BRACKETS = 1000  # of a text that the C parser reads
_DEEP_BLOCK = re.compile(r"[ \t?:-]{200}")
# PyYAML lets these slip for scalars that do not fit their tag, such as "!!bool x".
_SLIPPED = (ValueError, RecursionError, ArithmeticError, LookupError, AttributeError)
_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+|.*:.*")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses a key written twice in a mapping; PyYAML takes the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue  # `<<: *anchor`; a key may replace one that is merged in
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is written twice", key_node.start_mark
            )
        if isinstance(key, str):
            seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_mapping(node, deep=True))


# The C parser is six times faster; some builds of PyYAML lack it.
_CLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _FastLoader(_CLoader):  # type: ignore[misc]  # known only at run time
    """The same with the C parser."""


for _loader in (_Loader, _FastLoader):
    _loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _ValueLoader(_Loader):
    """Loader of a single value, in which nothing can be worth a name."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        untyped: Any = self
        event = untyped.peek_event()
        if getattr(event, "anchor", None) is not None:
            problem = f"anchors and aliases ({event.anchor!r}) are for files only; write it out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


def format_choices(key: str, known: Iterable[str]) -> str:
    """Return a text that names the closest valid choice, if any, and all of them."""
    names = sorted(known)
    guess = difflib.get_close_matches(str(key), names, n=1)
    close = f"; did you mean {guess[0]!r}?" if guess else ""
    return f"{close} (valid: {', '.join(names) or 'none'})"


def list_bundled_yaml(package: str, folder: str) -> list[str]:
    """Return the names of the YAML files that come with a package."""
    names = [path.name for path in (resources.files(package) / folder).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_yaml(name_or_path: str, package: str, folder: str, *, what: str) -> tuple[str, str]:
    """Return the source and the text of a bundled file, or of a file of the user's.

    Raises:
        ConfigError: there is neither.
    """
    names = list_bundled_yaml(package, folder)
    if name_or_path in names:
        source = f"{name_or_path}.yaml"
        return source, (resources.files(package) / folder / source).read_text(encoding="utf-8")
    path = expand_home(name_or_path)
    if path.is_file():
        return str(path), read_config_text(path)
    choices = format_choices(name_or_path, names)
    raise ConfigError(f"no {what} {name_or_path!r}: neither a file nor bundled{choices}")


def read_config_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return read_bounded(path, _LONGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None


def parse_yaml(source: str, text: str, *, anchors: bool = True) -> Any:
    """Return the content of YAML; without `anchors`, nothing in it may be named and repeated.

    Raises:
        ConfigError: it is malformed, or would become very large; names file, line and column.
    """
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:  # the parser would take time that grows with the square of it
        raise ConfigError(
            f"{source}: not valid YAML: more than {_DEEPEST} brackets inside each other"
        )
    if anchors and _is_shallow(text):
        # What the C parser refuses, the other one describes.
        with suppress(yaml.YAMLError, *_SLIPPED):
            return _load(_FastLoader, text)
    try:
        return _load(_Loader if anchors else _ValueLoader, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, *_SLIPPED) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _is_shallow(text: str) -> bool:
    """Return whether nothing in a text can be nested so deeply that the C parser overflows.

    Each level of the block style stands in a column of its own, after spaces and indicators only;
    two at most share one. Each of the flow style takes a bracket.
    """
    brackets = text.count("[") + text.count("{")
    return brackets <= _MOST_BRACKETS and not _DEEP_BLOCK.search(text)


def _load(kind: Any, text: str) -> Any:
    """Return the content of a text; `kind` is the loader."""
    loader = kind(text)  # refuses control characters
    try:
        # As a graph first, in which each alias is one edge: only then is it known how much a file
        # of a few lines would become.
        root = loader.get_single_node()
        if root is None:
            return None
        _count_values(root, {})
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[int, int], depth: int = 0) -> int:
    """Return how many values a node stands for once its aliases and merges are written out.

    `counts` holds the nodes that were counted, by their id.

    Raises:
        MarkedYAMLError: these are too many, too deep, or a number has too many digits.
    """
    if id(node) in counts:
        return counts[id(node)]
    problem = ""
    below: Sequence[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    elif node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
        problem = f"a number of more than {_LONGEST_NUMBER} digits"
    elif node.tag in _NUMBERS and _OTHER_BASE.fullmatch(node.value):
        # hours: 1:30 would be 90, and 010 would be 8.
        problem = (
            f"{node.value} would be read in base {60 if ':' in node.value else 8}; "
            "write a decimal number, or put quotes around a text"
        )
    if depth > _DEEPEST:  # also of what contains itself
        problem = f"more than {_DEEPEST} values inside each other"
        below = ()
    count = 1 + sum(_count_values(part, counts, depth + 1) for part in below)
    if count > _MOST_VALUES:
        problem = f"more than {_MOST_VALUES} values once its aliases are written out"
    if problem:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    counts[id(node)] = count
    return count


def validate_model(
    model: type[_Model],
    values: Mapping[str, Any],
    where: str,
    dotted: str = "",
    overrides: Sequence[str] = (),
    *,
    extra_choices: Sequence[str] = (),
) -> _Model:
    """Build settings or a pydantic model from values.

    `dotted` is the key of these values in a reproduction and `overrides` are its `--set` options,
    to name the one that a wrong value comes from. `extra_choices` are valid keys besides the
    fields.

    Raises:
        ConfigError: names file or --set, key, and what is expected.
    """
    try:
        if _is_settings(model):
            values = use_current_names(model, values)
        _refuse_internal(model, values)
        key: Any = model  # mypy takes no dataclass type for hashable
        built: _Model = _adapter(key).validate_python(dict(values))
        if not (location := _find_flag_for_number(built, values)):
            return built
        found: dict[str, Any] = {"type": "flag", "msg": "a number", "input": "yes or no"}
    except _UnknownKey as error:
        location = error.args[0]
        found = {"type": "extra_forbidden"}
    except ValidationError as error:
        errors = [dict(item) for item in error.errors(include_url=False)]
        found = next((item for item in errors if item["type"] in _UNKNOWN), errors[0])
        location = [str(part) for part in found["loc"]]
    name = ".".join(location)
    full = f"{dotted}.{name}".strip(".")
    if found["type"] == "value_error":
        # A rule on several fields: any --set below them may have broken it.
        sentence = str(found["msg"]).removeprefix("Value error, ")
        given = [text for text in overrides if _overlap(text.partition("=")[0].strip(), full)]
        source = f" (from {' '.join(f'--set {text}' for text in given)})" if given else ""
        raise ConfigError(f"{where}{f'.{name}' if name else ''}: {sentence}{source}")
    keys = [text.partition("=")[0].strip() for text in overrides]
    by_set = next((key for key in keys if full == key or full.startswith(f"{key}.")), None)
    place = f"--set {by_set}" if by_set else where
    if found["type"] in _UNKNOWN:
        known = [*_fields_at(model, location[:-1]), *(extra_choices if len(location) == 1 else ())]
        prefix = "" if by_set or len(location) == 1 else f".{'.'.join(location[:-1])}"
        choices = format_choices(location[-1], known)
        raise ConfigError(f"{place}{prefix}: unknown key {location[-1]!r}{choices}")
    if found["type"] == "missing":
        raise ConfigError(f"{place}: key {name!r} is missing")
    if found["type"] == "dataclass_type":
        expected = f"a mapping{format_choices('', _fields_at(model, location))}"
    else:
        expected = str(found["msg"]).removeprefix("Input should be ")
    head = place if by_set or not name else f"{place}.{name}"
    raise ConfigError(f"{head}: expected {expected}, got {found['input']!r}")


def _find_flag_for_number(built: Any, values: Any) -> list[str]:
    """Return where a value is yes or no and a number was made of it, which pydantic does; or []."""
    if not isinstance(values, Mapping):
        return []
    for key, value in values.items():
        made = getattr(built, str(key), None)
        if isinstance(value, bool) and isinstance(made, int | float) and type(made) is not bool:
            return [str(key)]
        if inner := _find_flag_for_number(made, value):
            return [str(key), *inner]
    return []


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class _UnknownKey(Exception):
    """There is no key at the location that is its argument."""


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _overlap(one: str, other: str) -> bool:
    """Return whether one dotted key lies within the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _refuse_internal(model: Any, values: Any, location: Sequence[str] = ()) -> None:
    """Raise _UnknownKey for a field that only code may give; pydantic would take it."""
    if not _is_settings(model) or not isinstance(values, Mapping):
        return
    names = {field.name for field in dataclasses.fields(model)}
    for key, value in values.items():
        field = setting_fields(model).get(key)
        if field is not None:
            _refuse_internal(field.nested, value, [*location, key])
        elif key in names:
            raise _UnknownKey([*location, key])


def _is_settings(model: Any) -> TypeGuard[type[Settings]]:
    return isinstance(model, type) and issubclass(model, Settings)


def _fields_at(model: Any, location: Sequence[str]) -> list[str]:
    """Return the field names of the class that a location leads to, through nested classes."""
    for part in location:
        model = _find_type_below(model, part)
    fields = setting_fields(model) if _is_settings(model) else getattr(model, "model_fields", ())
    return list(fields)


def _find_type_below(model: Any, key: str) -> Any:
    """Return the type of the value at a key: that of a field, or of all values of a mapping."""
    if _is_settings(model):
        field = setting_fields(model).get(key)
        return field.nested if field is not None else None
    if fields := getattr(model, "model_fields", None):
        return fields[key].annotation if key in fields else None
    return get_args(model)[1] if get_origin(model) is Mapping else None
