"""Draw mutants of the sources, run the tests that reach each, and print those that survive.

    make mutants SEED=7            150 mutants, into build/mutants_7.txt
    make mutants SEED=7 COUNT=20

The first run in a tree runs the whole suite once under coverage. Mutants that behave like the
original are listed in equivalent.txt (file, line before, line after, reason, with tabs between)
and are not drawn.
"""

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import reach
from mutate import Mutant, find_mutants
from reach import ROOT, Reach

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
NOT_FOUND = (
    4  # pytest's exit code when a name of a test is unknown, e.g. one that holds a mutated number
)


def draw(seed: int, count: int, under: str) -> Iterator[Mutant]:
    """Draw `count` mutants, each place as likely as another, without those known as equivalent."""
    known = [line.split("\t")[:3] for line in EQUIVALENT.read_text(encoding="utf-8").splitlines()]
    paths = [path for path in reach.sources(ROOT) if str(path.relative_to(ROOT)).startswith(under)]
    mutants = [mutant for path in paths for mutant in find_mutants(ROOT, path)]
    random.Random(seed).shuffle(mutants)
    for mutant in mutants:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        if count and [mutant.file, *mutant.diff(source)] not in known and changes(mutant, source):
            count -= 1
            yield mutant


def changes(mutant: Mutant, source: str) -> bool:
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def tests_of(mutant: Mutant, known: Reach, budget: float) -> tuple[list[str], float]:
    """Return the tests that run the line, or for code run at import those that use its name."""
    if mutant.words:
        found = known.of_words(mutant.words)
    else:
        found = known.of_lines(mutant.file, range(mutant.reach[0], mutant.reach[1] + 1))
        if not found and "render" in mutant.file:  # compiled kernels are not traced
            found = known.of_folder(str(Path(mutant.file).parent))
    return known.fastest_first(found, budget)


class Worker(threading.Thread):
    """A copy of the tree in which one mutant after the other is tried."""

    def __init__(
        self, mutants: Iterator[Mutant], lock: threading.Lock, known: Reach, budget: float
    ) -> None:
        super().__init__()
        self.mutants, self.lock, self.known, self.budget = mutants, lock, known, budget
        self.copy = reach.copy_tree()
        self.done: list[tuple[Mutant, str]] = []

    def run(self) -> None:
        try:
            while (mutant := self.next()) is not None:
                verdict = self.judge(mutant)
                self.done.append((mutant, verdict))
                print(f"{verdict:24} {mutant.file}:{mutant.lines[0]} {mutant.kind}", flush=True)
        finally:
            shutil.rmtree(self.copy, ignore_errors=True)

    def next(self) -> Mutant | None:
        with self.lock:
            return next(self.mutants, None)

    def judge(self, mutant: Mutant) -> str:
        tests, seconds = tests_of(mutant, self.known, self.budget)
        if not tests:
            return "survived (no test)"
        path = self.copy / mutant.file
        source, stat = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(mutant.apply(source), encoding="utf-8")
        try:
            code = self.test(tests, 120 + 6 * seconds)
            if code == NOT_FOUND:
                code = self.test(sorted({test.partition("::")[0] for test in tests}), 900)
        finally:
            path.write_text(source, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the compiled file fits again
        return "survived" if code == 0 else "killed"

    def test(self, names: list[str], limit: float) -> int | None:
        """Return the exit code of pytest, which the first failure ends;
        None after the time limit.
        """
        listed = self.copy / "names.txt"
        listed.write_text("\n".join(names), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"@{listed}"]
        process = subprocess.Popen(
            command, cwd=self.copy, env=reach.environment(PYTHONPATH=str(self.copy)),
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
    score = Counter((mutant.file.split("/")[0], verdict == "killed") for mutant, verdict in done)
    for name in sorted({name for name, _ in score}):
        killed, survived = score[name, True], score[name, False]
        share = killed / (killed + survived)
        yield f"{name:16} {killed:4} killed {survived:4} survived {share:6.0%}"
    killed = sum(verdict == "killed" for _, verdict in done)
    yield f"{'all':16} {killed:4} killed {len(done) - killed:4} survived {killed / len(done):6.0%}"
    for mutant, verdict in sorted(done, key=lambda one: (one[0].file, one[0].lines)):
        if verdict != "killed":
            before, after = mutant.diff((ROOT / mutant.file).read_text(encoding="utf-8"))
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
    parser.add_argument(
        "--stale", action="store_true", help="use the newest coverage, even of another tree"
    )
    options = parser.parse_args()
    known, lock = reach.load(options.stale), threading.Lock()
    mutants = draw(options.seed, options.count, options.under)
    workers = [Worker(mutants, lock, known, options.budget) for _ in range(options.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    text = "\n".join(report([one for worker in workers for one in worker.done])) + "\n"
    (ROOT / "build" / f"mutants_{options.seed}.txt").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
