"""Reading reproductions, what is said about mistakes in them, and the plan."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import config, reading
from pipeline.identity import run_id, runtime_names, science_fields
from pipeline.plan import build_plan, list_unset_settings, select_runs
from pipeline.spec import ConfigError, StageRun, StageSpec

Plan = Callable[..., list[StageRun]]


@pytest.fixture
def plan(tmp_path: Path, stages: dict[str, StageSpec], text: str) -> Plan:
    """Plan the text, after replacements in it, with overrides."""

    def build(*overrides: str, replace: tuple[str, str] = ("", "")) -> list[StageRun]:
        path = tmp_path / "small.yaml"
        assert replace[0] in text
        path.write_text(text.replace(*replace) if replace[0] else text)
        return build_plan(config.load_reproduction(str(path), stages, overrides))

    return build


def test_order_ids_and_resources(plan: Plan) -> None:
    runs = plan()
    assert [run.name for run in runs] == ["digits", "main", "knn"]
    digits, main, knn = runs
    assert knn.needs == {"data": digits.run_id, "weights": main.run_id}
    assert (main.resources.gpus, main.resources.nodes, digits.resources.gpus) == (16, 2, 0)
    assert main.key == f"main-{main.run_id}"
    # literal: a changed default or a changed rule must be noticed
    assert [run.run_id for run in runs] == ["efbfac6c4b7c", "167615e4d630", "c3b6aeb5fdf0"]


def test_identity_follows_science_only(plan: Plan) -> None:
    plain = {run.name: run.run_id for run in plan()}
    for same in (
        "main.workers=9",
        "main.resources.nodes=5",
        "digits.train_dir=/x",
        "main.optimizer.log_every=1",
    ):
        assert {run.name: run.run_id for run in plan(same)} == plain, same
    for other in ("main.epochs=4", "main.optimizer.lr=1e-4", "main.drop=0.1"):
        changed = {run.name: run.run_id for run in plan(other)}
        assert [name for name in plain if changed[name] != plain[name]] == ["main", "knn"], other
    assert all(run.run_id != plain[run.name] for run in plan("digits.dataset=other"))


def test_science_has_none_and_no_runtime(plan: Plan) -> None:
    main = plan()[1]
    assert science_fields(main.config) == {"epochs": 3, "drop": None, "optimizer": {"lr": 0.001}}
    assert runtime_names(type(main.config)) == {"workers", "optimizer.log_every"}
    assert run_id("a", main.config, {"x": "1", "y": "2"}) == run_id(
        "a", main.config, {"y": "2", "x": "1"}
    )
    assert run_id("a", main.config, {"x": "1"}) != run_id("b", main.config, {"x": "1"})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "epochs: 3",
            "epoch: 3",
            ["small.yaml: runs.main", "'epoch'", "did you mean 'epochs'", "workers"],
        ),
        ("epochs: 3", "epochs: three", ["small.yaml: runs.main.epochs", "integer", "'three'"]),
        ("epochs: 3", "optimizer: {lrr: 1}", ["runs.main.optimizer", "'lrr'", "did you mean 'lr'"]),
        ("nodes: 2", "node: 2", ["runs.main.resources", "'node'", "did you mean 'nodes'"]),
        ("nodes: 2", "nodes: 0", ["runs.main.resources.nodes", "greater than or equal to 1"]),
        ("stage: train", "stage: trian", ["runs.main.stage", "'trian'", "did you mean 'train'"]),
        ("name: small", "nam: small", ["small.yaml: unknown key 'nam'", "did you mean 'name'"]),
        ("epochs: 3", "epochs: 3, epochs: 4", ["small.yaml:5", "'epochs' is written twice"]),
        ("epochs: 3", "epochs: [3", ["small.yaml:", "not valid YAML"]),
        (
            "weights: main",
            "weights: mian",
            ["runs.knn.needs.weights", "no run 'mian'", "did you mean 'main'"],
        ),
        ("weights: main", "weights: digits", ["'digits' is a 'data' run", "expected train"]),
        ("weights: main", "wieghts: main", ["no role 'wieghts'", "did you mean 'weights'"]),
        ("{data: digits}", "{}", ["runs.main.needs", "role 'data' is not filled", "data run"]),
        ("main: {stage", "ma/in: {stage", ["ma/in", "letters"]),
        ("epochs: 3", "epochs: 2024-01-01", ["runs.main.epochs", "datetime.date(2024, 1, 1)"]),
        ("epochs: 3", "2024-01-01: 3", ["runs.main", "datetime.date(2024, 1, 1)"]),
        ("epochs: 3", r'epochs: "\UFFFFFFFF"', ["not valid YAML"]),
        ("epochs: 3", "epochs: !!timestamp zz", ["not valid YAML"]),
        ("epochs: 3", "epochs: \0", ["small.yaml: not valid YAML", "#x0000"]),
        ("epochs: 3", "epochs: \x1b[31m", ["small.yaml: not valid YAML", "#x001b"]),
        ("epochs: 3", "epochs: !!bool x", ["not valid YAML"]),
        ("epochs: 3", "epochs: !!int ''", ["not valid YAML"]),
        ("epochs: 3", "epochs: !!binary [1]", ["not valid YAML"]),
        ("epochs: 3", "epochs: &a [*a]", ["small.yaml:", "more than 200 values inside each other"]),
        ("epochs: 3", f"epochs: {'9' * 401}", ["small.yaml:", "a number of more than 400 digits"]),
        (
            "epochs: 3",
            f"x: &x [{'1, ' * 999}], y: &y [{'*x, ' * 9}], z: [{'*y, ' * 12}]",
            ["small.yaml:", "more than 100000 values once its aliases are written out"],
        ),
    ],
)
def test_mistakes_are_explained(plan: Plan, old: str, new: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(replace=(old, new))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("main.epoch=3", ["--set main.epoch", "did you mean 'epochs'"]),
        ("main.epochs=x", ["--set main.epochs", "integer", "'x'"]),
        ("mian.epochs=3", ["unknown run 'mian'", "did you mean 'main'"]),
        ("main=3", ["expected run.key=value"]),
        ("main.epochs.x=3", ["epochs is 3, not a mapping"]),
        ("main.epochs=&a 3", ["--set main.epochs:1:1", "anchors and aliases ('a')"]),
        ("main.epochs=\x1b[1m", ["--set main.epochs: not valid YAML", "#x001b"]),
        ("main.like=[x, *a]", ["--set main.like:1:5", "anchors and aliases ('a')"]),
        ("main.resources=0", ["runs.main.resources: expected a mapping"]),
        ("main.resources=[]", ["runs.main.resources: expected a mapping"]),
        ("main.needs=false", ["runs.main.needs: expected a mapping"]),
    ],
)
def test_mistakes_in_overrides_blame_the_option(
    plan: Plan, override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(override)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("override", ["main.resources=", "main.resources=~", "main.resources={}"])
def test_no_resources_are_those_of_the_stage(
    plan: Plan, stages: dict[str, StageSpec], override: str
) -> None:
    (main,) = (run for run in plan(override) if run.name == "main")
    assert main.resources == stages["train"].resources


def test_optional_role_may_be_empty(plan: Plan) -> None:
    assert set(plan(replace=(", weights: main", ""))[-1].needs) <= {"data"}


def test_cycle_is_named(tmp_path: Path, stages: dict[str, StageSpec]) -> None:
    loop = {**stages, "loop": StageSpec("loop", stages["train"].config, "x:run", {"data": "loop"})}
    path = tmp_path / "c.yaml"
    path.write_text(
        "runs:\n  a: {stage: loop, needs: {data: b}}\n  b: {stage: loop, needs: {data: a}}\n"
    )
    with pytest.raises(ConfigError, match="circle: a -> b -> a"):
        build_plan(config.load_reproduction(str(path), loop))


def test_equal_runs_are_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="'digits' and 'again' are the same run"):
        plan(replace=("  digits:", "  again: {stage: data}\n  digits:"))


def test_unknown_reproduction() -> None:
    with pytest.raises(
        ConfigError, match="no reproduction 'nothing_like_it': neither a file nor bundled"
    ):
        config.load_reproduction("nothing_like_it", {})


def test_unresolved_names_the_key_to_set(plan: Plan) -> None:
    assert list_unset_settings(plan()) == [
        "digits.train_dir is not set: --set digits.train_dir=/path/to/train_dir"
    ]
    assert list_unset_settings(plan("digits.train_dir=/data")) == []


def test_select(plan: Plan) -> None:
    runs = plan()
    assert [run.name for run in select_runs(runs, ["test", "main"])] == ["main", "knn"]
    with pytest.raises(ConfigError, match="did you mean 'main'"):
        select_runs(runs, ["mani"])


def list_yaml_texts() -> list[tuple[str, str]]:
    recipes = [
        reading.find_yaml(name, "pipeline", "configs/recipes", what="recipe file")
        for name in config.list_recipe_files()
    ]
    return [*map(config.find_reproduction, config.list_bundled()), *recipes]


def parse_slowly(source: str, text: str, monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_is_shallow", lambda text: False)
        return reading.parse_yaml(source, text)


def test_both_parsers_read_the_same_from_bundled_files(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list_yaml_texts()
    assert len(texts) > 20
    for source, text in texts:
        assert reading._is_shallow(text)
        assert reading.parse_yaml(source, text) == parse_slowly(source, text, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2\n",
        "a: [1\nb: 2",
        "a:\n\tb: 1",
        'a: "\\UFFFFFFFF"',
        "!!bool x",
        "a: &x 1\nb: *y",
        "a: 1\n--- \nb: 2",
        "\x07",
        "a: " + "1" * 500,
        "a: &a [*a]",
        "a: " * 200,
    ],
)
def test_both_parsers_refuse_the_same_in_the_same_words(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as fast:
        reading.parse_yaml("x.yaml", text)
    with pytest.raises(ConfigError) as slow:
        parse_slowly("x.yaml", text, monkeypatch)
    assert str(fast.value) == str(slow.value)


@pytest.mark.parametrize("text", ["- " * 100_000, "? " * 100_000, '[ "]", ' * 30_000])
def test_what_is_nested_deeply_never_reaches_the_c_parser(text: str) -> None:
    assert not reading._is_shallow(text)
    with pytest.raises(ConfigError, match=r"^x\.yaml"):
        reading.parse_yaml("x.yaml", text[:20_000])


@pytest.mark.parametrize(
    "text",
    ["\n".join(" " * n + "a:" for n in range(190)), "- " * 90 + "1", "[" * 190 + "]" * 190],
)
def test_the_deepest_texts_for_the_c_parser(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading._is_shallow(text)
    assert reading.parse_yaml("x.yaml", text) == parse_slowly("x.yaml", text, monkeypatch)
