"""Find all single-place mutants of a file: another operator, number or order, a statement less.

Not mutated is what changes no behavior that a test should hold: docstrings, messages, log lines,
annotations (except the bounds in them), `__repr__`, assertions, colors and sizes of figures.
"""

import ast
import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
TALK = {"logger", "logging", "log", "warnings", "console"}
NO_EFFECT = {
    "help", "encoding", "strict", "frozen", "slots", "kw_only", "stacklevel", "figsize", "dpi",
    "linewidth", "lw", "alpha", "fontsize", "markersize", "color", "indent", "description",
    "metavar", "pad_inches", "rich_help_panel", "desc", "name", "daemon", "maxsize",
}  # fmt: skip
MODULES = {"np", "torch", "os", "nn", "pd", "ast", "sys", "re", "json", "time", "math", "signal"}
NOT_IN_HEAD = {"body", "orelse", "finalbody", "handlers", "returns", "decorator_list"}
UNORDERED = {"isinstance", "issubclass", "max", "min", "print", "getattr", "Literal", "gcd"}


@dataclass(frozen=True)
class Mutant:
    """A piece of a file, as lines and bytes within them, and what stands there instead."""

    file: str
    lines: tuple[int, int]
    columns: tuple[int, int]
    text: str
    kind: str
    reach: tuple[int, int]  # lines of the statement, or of the head of a compound one
    words: tuple[str, ...]  # names that stand for code which runs at import; () inside functions

    def apply(self, source: str) -> str:
        rows = source.encode().splitlines(keepends=True)
        first, last = self.lines[0] - 1, self.lines[1] - 1
        changed = (
            rows[first][: self.columns[0]] + self.text.encode() + rows[last][self.columns[1] :]
        )
        return b"".join([*rows[:first], changed, *rows[last + 1 :]]).decode()

    def diff(self, source: str) -> tuple[str, str]:
        """The changed lines before and after, each as one line."""
        old, new = source.splitlines(), self.apply(source).splitlines()
        start, end = self.lines[0] - 1, self.lines[1]
        changed = new[start : end + len(new) - len(old)]
        return tuple(" ".join(" ".join(part).split()) for part in (old[start:end], changed))


class Finder:
    """Walk a file and remember the statement and the scopes around a place."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.tree = file, ast.parse(source)
        self.called = {id(node.func) for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
        self.siblings: dict[str, set[str]] = defaultdict(set)
        for node in ast.walk(self.tree):
            if (place := self.attribute_or_key(node)) is not None:
                self.siblings[place[0]].add(place[1])

    def statement(self, node: ast.stmt, words: tuple[str, ...], inside: bool) -> Iterator[Mutant]:
        """Find the mutants of a statement and of those inside it.

        `words` are the names of the scopes around it that run at import.
        """
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.Global)):
            return
        body = [one for part in ("body", "orelse", "finalbody") for one in getattr(node, part, [])]
        body += [one for handler in getattr(node, "handlers", []) for one in handler.body]
        # Only the head of a compound statement: its body is statements of their own.
        last = body[0].lineno - 1 if body else node.end_lineno
        self.reach = (node.lineno, max(last, node.lineno))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name in ("__repr__", "__str__"):
                return
            words = words if inside else (*words, node.name)
        self.words = () if inside else (*words, *target_names(node))
        yield from self.whole(node)
        for part, value in ast.iter_fields(node):
            # Of an annotation only the bounds in it, which are arguments of calls, have an effect.
            if part == "annotation":
                value = [one for one in ast.walk(value) if isinstance(one, ast.Call)]
            if part not in NOT_IN_HEAD:
                yield from self.expression(value, node)
        for one in body:
            yield from self.statement(one, words, inside or isinstance(node, ast.FunctionDef))

    def whole(self, node: ast.stmt) -> Iterator[Mutant]:
        match node:
            case ast.Expr(ast.Call() as call) if not talks(call):
                yield self.mutant(node, "pass", "removed call")
            case ast.Raise() | ast.AugAssign():
                yield self.mutant(node, "pass", "removed statement")
            case ast.If() | ast.While():
                yield from self.here(node, node)
            case ast.Return(ast.expr()):
                yield self.mutant(node, "return None", "returns None")
        if isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
            yield self.replaced(node, "operator", op=SWAPPED[type(node.op)]())

    def expression(self, value: object, around: ast.AST) -> Iterator[Mutant]:
        if isinstance(value, list):
            for one in value:
                yield from self.expression(one, around)
        # Python 3.11 does not know where the parts of an f-string stand; most are messages anyway.
        if (
            not isinstance(value, ast.AST)
            or isinstance(value, (ast.JoinedStr, ast.expr_context))
            or isinstance(around, ast.Raise)
            or (isinstance(value, ast.Call) and talks(value))
            or (isinstance(value, ast.keyword) and value.arg in NO_EFFECT)
        ):
            return
        yield from self.here(value, around)
        for part, inner in ast.iter_fields(value):
            if part != "annotation":
                yield from self.expression(inner, value)

    # One case for each kind of expression: it reads as the list that it is.
    def here(self, node: ast.AST, around: ast.AST) -> Iterator[Mutant]:  # noqa: C901
        """Find the mutants of one expression, not of its parts."""
        match node:
            case ast.BinOp(left, op, right) if type(op) in SWAPPED and not (
                is_text(left) or is_text(right) or is_type(left)
            ):
                yield self.replaced(node, "operator", op=SWAPPED[type(op)]())
            case ast.BoolOp(op):
                yield self.replaced(node, "and or", op=SWAPPED[type(op)]())
            case ast.Compare(ops=[op, *rest]):
                yield self.replaced(node, "comparison", ops=[SWAPPED[type(op)](), *rest])
            case ast.UnaryOp(ast.Not() | ast.USub(), operand):
                yield self.mutant(node, f"({ast.unparse(operand)})", "removed not or minus")
            case ast.Constant(bool() as value):
                yield self.mutant(node, str(not value), "constant")
            case ast.Constant(int() | float() as value):
                place = random.Random(f"{self.file} {node.lineno} {node.col_offset}")
                other = place.choice([value + 1, value - 1, value * 2] if value else [1, -1])
                yield self.mutant(node, repr(other), "number")
            case ast.Tuple(elts=[first, second, *rest], ctx=ast.Load()) if not isinstance(
                around, (ast.Compare, ast.Subscript)
            ):
                yield self.replaced(node, "swapped elements", elts=[second, first, *rest])
            case ast.IfExp() | ast.If() | ast.While() if not isinstance(
                node.test, (ast.Compare, ast.BoolOp)
            ):
                yield self.mutant(node.test, f"(not ({ast.unparse(node.test)}))", "condition")
            case ast.Call():
                yield from self.call(node)
        if (place := self.attribute_or_key(node)) is not None:
            for other in sorted(self.siblings[place[0]] - {place[1]})[:1]:
                yield self.replaced(node, "sibling", attr=other, slice=ast.Constant(other))

    def attribute_or_key(self, node: ast.AST) -> tuple[str, str] | None:
        """Split `config.epochs` or `row["top1"]` into owner and member; None for all else."""
        match node:
            case ast.Attribute(ast.Name(name), attr, ast.Load()) if name[0].islower():
                return None if id(node) in self.called or name in MODULES else (f"{name}.", attr)
            case ast.Subscript(ast.Name(name), ast.Constant(str() as key), ast.Load()):
                return f"{name}[]", key
        return None

    def call(self, node: ast.Call) -> Iterator[Mutant]:
        name = ast.unparse(node.func).rpartition(".")[2]
        plain = [one for one in node.args if not isinstance(one, ast.Starred)]
        if len(plain) > 1 and len(plain) == len(node.args) and name not in UNORDERED:
            yield self.replaced(node, "swapped arguments", args=[plain[1], plain[0], *plain[2:]])
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in NO_EFFECT:
                rest = node.keywords[:index] + node.keywords[index + 1 :]
                yield self.replaced(node, "dropped argument", keywords=rest)

    def replaced(self, node: ast.AST, kind: str, **fields: object) -> Mutant:
        other = copy.copy(node)
        for field, value in fields.items():
            setattr(other, field, value)
        text = ast.unparse(other)
        # In parentheses, or the new operator would bind to other parts than the old one did.
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare)):
            text = f"({text})"
        return self.mutant(node, text, kind)

    def mutant(self, node: ast.AST, text: str, kind: str) -> Mutant:
        lines, columns = (node.lineno, node.end_lineno), (node.col_offset, node.end_col_offset)
        return Mutant(self.file, lines, columns, text, kind, self.reach, self.words)


def target_names(node: ast.stmt) -> list[str]:
    return [
        one.id
        for target in getattr(node, "targets", None) or [getattr(node, "target", None)]
        if target
        for one in ast.walk(target)
        if isinstance(one, ast.Name)
    ]


def talks(call: ast.Call) -> bool:
    """True for log lines, warnings and prints."""
    words = ast.unparse(call.func).split(".")
    return words[0] in TALK or words[-1] == "print"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def is_type(node: ast.AST) -> bool:
    """True for the left side of a union of types, `int | None`."""
    return isinstance(node, ast.Name) and (
        node.id in ("int", "float", "str", "bool") or node.id[0].isupper()
    )


def find_mutants(root: Path, path: Path) -> list[Mutant]:
    finder = Finder(str(path.relative_to(root)), path.read_text(encoding="utf-8"))
    return [one for statement in finder.tree.body for one in finder.statement(statement, (), False)]
