"""Which package may import which, and that nothing imports in a circle: every file is parsed."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mugs.methods.config import METHODS

ROOT = Path(__file__).resolve().parents[2]
OURS = {"pipeline", "mugs", "results", "slurm", "stages", "run_stage"}
GROUND = ("pipeline.files", "pipeline.control", "pipeline.settings")
GROUND_FOREIGN = {"pipeline.settings": {"pydantic"}}  # the others need the standard library only
ALLOWED: dict[str, tuple[str, ...]] = {
    "mugs": GROUND,
    "pipeline": (),
    "results": ("pipeline.files", "pipeline.text"),
    "slurm": ("pipeline",),
    "stages": ("pipeline", "results"),  # and CONFIGS
    "run_stage": ("pipeline", "slurm", "stages", "results"),
}
INSIDE_FUNCTIONS = {"stages": ("mugs",)}
FOREIGN_NEVER = {
    "mugs": {"submitit", "yaml"},
    "pipeline": {"torch", "submitit", "pandas"},
    "results": {"torch", "submitit"},
    "slurm": {"torch", "pandas"},
    "stages": {"submitit"},
    "run_stage": {"torch", "pandas"},
}
AT_TOP_NEVER = {
    "stages": {"torch", "numpy", "pandas"},
    "results": {"numpy", "matplotlib", "jinja2", "markupsafe", "sklearn", "PIL", "safetensors"},
}


def sources() -> dict[str, Path]:
    """Every Python file of ours outside the tests, by module name."""
    found = [path for name in sorted(OURS) for path in (ROOT / name).rglob("*.py")]
    return {module_name(path): path for path in [*found, ROOT / "run_stage.py"]}


def module_name(path: Path) -> str:
    """Dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = sources()
CONFIGS = tuple(name for name in SOURCES if name.startswith("mugs.") and name.endswith(".config"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, and whether it does so inside a function or for types only."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield (full if full in SOURCES else child.module or ""), inside
            else:
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, inside or function or typing_only)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of some packages or lies in it."""
    return any(module == name or module.startswith(f"{name}.") for name in packages)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_table(module: str) -> None:
    package = module.split(".")[0]
    allowed = (*ALLOWED[package], *(CONFIGS if package == "stages" else ()), package)
    for name, inside in imports(SOURCES[module]):
        here = (*allowed, *INSIDE_FUNCTIONS.get(package, ())) if inside else allowed
        top = name.split(".")[0]
        assert top not in OURS or within(name, here), f"{module} may not import {name} here"
        assert top not in FOREIGN_NEVER[package], f"{module} may not import {name}"
        at_top_never = AT_TOP_NEVER.get(package, set())
        assert inside or top not in at_top_never, f"{module}: import {name} inside run()"


@pytest.mark.parametrize("module", GROUND)
def test_the_ground_needs_next_to_nothing(module: str) -> None:
    known = sys.stdlib_module_names | {"pipeline"} | GROUND_FOREIGN.get(module, set())
    assert {name.split(".")[0] for name, _ in imports(SOURCES[module])} <= known


def require_no_circle(graph: Mapping[str, set[str]]) -> None:
    """Fail with the modules or folders that import each other."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def ours(module: str) -> set[str]:
    """Modules of ours that a module imports, itself left out."""
    return {name for name, _ in imports(SOURCES[module]) if name in SOURCES} - {module}


def test_no_files_import_in_a_circle() -> None:
    require_no_circle({module: ours(module) for module in SOURCES})


def test_no_folders_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in SOURCES.items():
        folder = str(path.parent)
        graph[folder] |= {str(SOURCES[name].parent) for name in ours(module)} - {folder}
    require_no_circle(graph)


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.manifest",
        "pipeline.plan",
        "slurm.submission.submit",
        "slurm.status",
        "stages",
        ", ".join(CONFIGS),
    ],
)
def test_light_modules_stay_light(module: str) -> None:
    heavy = "{'torch', 'pandas', 'numpy'} & set(sys.modules)"
    code = f"import sys, {module}; sys.exit(' '.join({heavy}) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


METHOD_BLIND = ("mugs/engine", "mugs/data", "mugs/pretrain", "mugs/checkpoint", "stages")


@pytest.mark.parametrize("folder", METHOD_BLIND)
def test_what_serves_all_methods_names_none(folder: str) -> None:
    """No class, module, setting or name of a method in code; comments and docstrings may cite one.

    "mugs" is also the name of the package and of a source of weights.
    """
    names = {*METHODS} - {"mugs"}
    names |= {entry.entrypoint.partition(":")[2] for entry in METHODS.values()}
    names |= {entry.options.__name__ for entry in METHODS.values()}
    pattern = re.compile(rf"\b({'|'.join(sorted(names))}|methods\.({'|'.join(METHODS)}))\b")
    for path in sorted((ROOT / folder).rglob("*.py")):
        code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
        assert not pattern.search(code), path
        assert "cfg.mugs" not in code, path
        assert "config.mugs" not in code, path


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Return the code without strings that stand alone; unparsing leaves out the comments."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            alone = [x for x in body if not is_text(x)]
            node.body = alone or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def is_text(node: ast.AST) -> bool:
    """Return whether a statement is nothing but a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
