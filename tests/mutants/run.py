"""Draw mutants of the sources, run the tests that reach each, and print those that survive.

    make mutants SEED=7            150 mutants, into build/mutants_7.txt
    make mutants SEED=7 COUNT=20

The first run in a tree runs the whole suite once under coverage, a later one the test files that
changed. Mutants that behave like the original are listed in equivalent.txt (file, line before,
line after, reason, with tabs between) and are not drawn.
"""

import argparse
import ast
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import reach
from mutate import Mutant, find_mutants

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
NOT_FOUND = (
    4  # pytest's exit code when a name of a test is unknown, e.g. one that holds a mutated number
)


# Run ids and a page of docs/ hold the default of every setting, whatever lines they run.
OF_DEFAULTS = re.compile(r"test_run_ids\.py|test_generated_pages_are_current")


def draw(seed: int, count: int, under: str) -> Iterator[Mutant]:
    """Draw `count` mutants, each place as likely as another, without those known as equivalent."""
    known = [line.split("\t")[:3] for line in EQUIVALENT.read_text(encoding="utf-8").splitlines()]
    paths = [path for path in reach.SOURCES if str(path.relative_to(reach.ROOT)).startswith(under)]
    mutants = [mutant for path in paths for mutant in find_mutants(reach.ROOT, path)]
    random.Random(seed).shuffle(mutants)
    for mutant in mutants:
        source = (reach.ROOT / mutant.file).read_text(encoding="utf-8")
        if count and [mutant.file, *mutant.diff(source)] not in known and changes(mutant, source):
            count -= 1
            yield mutant


def changes(mutant: Mutant, source: str) -> bool:
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def tests_of(mutant: Mutant, known: reach.Reach, budget: float) -> tuple[list[str], float]:
    """Return the tests that run the line, or for code run at import those that use its name."""
    if mutant.words:
        found = known.of_inner_lines(rf"\b({'|'.join(map(re.escape, mutant.words))})\b")
        found |= {n for n, test in enumerate(known.tests) if OF_DEFAULTS.search(test)}
    else:
        found = known.of_lines(mutant.file, range(mutant.reach[0], mutant.reach[1] + 1))
        if not found and "render" in mutant.file:  # compiled kernels are not traced
            found = known.of_inner_lines(folder=str(Path(mutant.file).parent))
    return known.fastest_first(found, budget)


class Trial:
    """Copies of the tree, in each of which one mutant at a time is tried."""

    def __init__(self, known: reach.Reach, budget: float) -> None:
        self.known, self.budget = known, budget
        self.copies: SimpleQueue[Path] = SimpleQueue()

    def judge(self, mutant: Mutant) -> str:
        """Return the verdict on a mutant and print it."""
        tests, seconds = tests_of(mutant, self.known, self.budget)
        verdict = "survived" if tests else "survived (no test)"
        copy = self.copies.get()
        try:
            if tests and self.run(copy, mutant, tests, 60 + 6 * seconds) != 0:
                verdict = "killed"
        finally:
            self.copies.put(copy)
        print(f"{verdict:24} {mutant.file}:{mutant.lines[0]} {mutant.kind}", flush=True)
        return verdict

    def run(self, copy: Path, mutant: Mutant, tests: list[str], limit: float) -> int | None:
        """Run the tests with the mutant in place of the original."""
        path = copy / mutant.file
        source, stat = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(mutant.apply(source), encoding="utf-8")
        try:
            code = run_tests(copy, tests, limit)
            if code == NOT_FOUND:
                code = run_tests(copy, sorted({test.partition("::")[0] for test in tests}), 900)
            return code
        finally:
            path.write_text(source, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the compiled file fits again


def run_tests(copy: Path, names: list[str], limit: float) -> int | None:
    """Return the exit code of pytest, which the first failure ends; None after the time limit."""
    listed = copy / "names.txt"
    listed.write_text("\n".join(names), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"@{listed}"],
        cwd=copy, env=reach.environment(PYTHONPATH=str(copy)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report(done: list[tuple[Mutant, str]]) -> Iterator[str]:
    """List the score by package, then each survivor with its line before and after."""
    packages = sorted({mutant.file.split("/")[0] for mutant, _ in done})
    for name in [*packages, "all"]:
        verdicts = [v for mutant, v in done if name in ("all", mutant.file.split("/")[0])]
        killed = verdicts.count("killed")
        score = f"{killed:4} killed {len(verdicts) - killed:4} survived"
        yield f"{name:16} {score} {killed / len(verdicts):6.0%}"
    for mutant, verdict in sorted(done, key=lambda one: (one[0].file, one[0].lines)):
        if verdict != "killed":
            before, after = mutant.diff((reach.ROOT / mutant.file).read_text(encoding="utf-8"))
            yield f"\n{mutant.file}:{mutant.lines[0]} {verdict}, {mutant.kind}"
            yield f"- {before}\n+ {after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int, nargs="?", default=150)
    parser.add_argument("--under", default="", help="only files whose path starts like this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds of tests per mutant, at most"
    )
    parser.add_argument("--select", default="not slurm", help="marks of tests")
    options = parser.parse_args()
    trial = Trial(reach.load(options.select), options.budget)
    mutants = list(draw(options.seed, options.count, options.under))
    with contextlib.ExitStack() as stack:
        for _ in range(options.jobs):
            trial.copies.put(stack.enter_context(reach.copied_tree()))
        pool = stack.enter_context(ThreadPoolExecutor(options.jobs))
        verdicts = list(pool.map(trial.judge, mutants))
    text = "\n".join(report(list(zip(mutants, verdicts, strict=True)))) + "\n"
    (reach.ROOT / "build" / f"mutants_{options.seed}.txt").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
