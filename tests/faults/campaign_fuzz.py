"""Random command lines, profiles, reproductions and environments: every one ends with an exit code
that is documented, and none with a traceback.

All cases run in this process. Nothing reaches a network or a Slurm, nothing is written outside the
folder of the case, and ranks that `run` starts end at once.
"""

# ruff: noqa: E402

import contextlib
import copy
import io
import logging
import os
import random
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import typer
import yaml
from called import DOCUMENTED, time_limit
from commands import write_commands
from fence import fenced
from outcome import Outcome

import run_stage
from pipeline.run_root import mark_run_root
from slurm.notify import send_message

NAME = "9f_random_calls"
KINDS = ("command line", "profile", "reproduction", "environment")
LIMIT_S = 60.0  # of computing, for one case: the first that needs torch imports it
# Words that lead out of the folder of a case, which the fence around it may refuse.
OUTSIDE = ("/dev/null", "/proc/none")
COMMANDS: dict[str, Any] = typer.main.get_command(run_stage.app).commands  # type: ignore[attr-defined]

# A reproduction and a profile that are right; each case breaks one of them, or neither.
REPRODUCTION = """
name: tiny
runs:
  photos: {stage: convert, dataset: photos, train_dir: data/train, val_dir: data/val,
           num_classes: 2, num_train_images: 4, num_val_images: 4,
           resources: {gpu: false, ranks_per_node: 1, hours: 0.5}}
  pretrain:
    like: mini/pretrain
    needs: {data: photos}
    epochs: 2
    batch_size: 2
    warmup_epochs: 1
  features: {stage: features, needs: {data: photos, weights: pretrain}, resize: 32, crop: 32}
  knn: {stage: knn, needs: {features: features}, ks: [1, 2], temperatures: [0.07]}
"""
PROFILE = """
run_root: $HOME/runs
partition: gpu
account: lab
gpu_type: a100
gpus_per_node: 8
cpus_per_rank: 4
memory_per_gpu_gb: 100
max_hours: 24
signal_delay_s: 300
setup: [module load cuda]
env: {OMP_NUM_THREADS: "1"}
sbatch: {comment: hello, mail-type: END}
srun: [--label]
stages:
  convert: {partition: cpu, memory_gb: 64}
"""
WORDS = (
    "", " ", "x", "mini", "paper", "pretrain", "knn", "table1", "0", "-1", "3", "1.5", "1e400",
    "nan", ".inf", "null", "~", "[]", "{}", "[1, 2", "{a: b", "true", "2026-13-45", "0x", "1_0",
    "*a", "&a b", "!!python/object:os.system x", "a" * 300, "ä", "\u202e", "日本", "a\nb", "a\tb",
    "\x1b[31m", "\udce9", "%j", "$HOME", "${NO", "$(id)", "`id`", "'", '"', "\\", "a|b", "a,b",
    "a=b", "--", "-", "--help", "-x", "--set", "@", ":", "99999999999999999999",
    "-99999999999999999999",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**30, 1.5, -0.0, float("inf"), float("nan"), "", "x", "ä",
    "\udce9", "a\nb", "1e-3", "~", "$HOME", [], [[]], [None], [1, "a"], {}, {"a": None}, {"": 1},
    {"a": {"b": [{}]}}, "pretrain", "mini/pretrain", "features", "table1", ["pretrain"],
)  # fmt: skip
VARIABLES = (
    "MUGS_RUN_ROOT", "MUGS_CACHE_DIR", "MUGS_STAGE_MODULES", "MUGS_TF32", "MUGS_WEBHOOK", "HOME",
    "USER", "TMPDIR", "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "LC_ALL", "LANG",
    "SLURM_JOB_ID", "SLURM_CONF", "SBATCH_ACCOUNT", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE",
    "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONPATH", "XDG_CACHE_HOME", "SOURCE_DATE_EPOCH",
)  # fmt: skip
# What Slurm's commands may say: nothing, what they should, less, more, or no text at all.
ANSWERS = (
    "exit 0",
    "exit 1",
    "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
    "echo 77",
    "echo 'a plugin speaks first'; echo '78;cluster'",
    "echo '7|mugs-x|RUNNING|None|(null)|0|(null)|(null)'",
    "echo '||||||||'; echo '7|mugs'",
    "printf '\\377\\376\\000\\n'",
    "echo 'NodeName=n1 State=IDLE CPUTot=many RealMemory=lots Partitions=gpu Gres=gpu:a100'",
    "echo 'PartitionName=gpu MaxTime=1-00:00:00 State=UP TotalNodes=2 MaxNodes=1'",
    "echo 'PartitionName= MaxTime=x'; exit 3",
    "yes | head -c 100000",
)


@dataclass
class Case:
    """One call of the command line: its arguments, environment, encoding of the terminal."""

    kind: str
    arguments: list[str]
    environment: dict[str, str]
    encoding: str = "utf-8"


class Fuzzer:
    """Cases of one seed, in a folder of their own; `folder/work` is where they are called."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.work, self.random = folder, folder / "work", random.Random(seed)
        for split in ("train", "val"):
            for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
                path = self.work / "data" / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(PNG)
        (self.work / "garbage").write_bytes(bytes(range(256)))
        (self.work / "empty").touch()
        for name in ("tiny.yaml", "cluster.yaml"):
            (self.work / name).touch()
        # Most commands end at once where no run root is; in some cases none is.
        if self.random.random() < 0.9:
            for run_root in ("runs", "mugs-runs"):
                (folder / run_root).mkdir(exist_ok=True)
                mark_run_root(folder / run_root)

    def make_case(self, kind: str) -> Case:
        """Write the files of a case, and return it."""
        reproduction, profile = REPRODUCTION, PROFILE
        environment = {
            "HOME": str(self.folder),
            "MUGS_CACHE_DIR": str(self.folder / "cache"),
            "PATH": self._write_slurm(),
            "COLUMNS": "100",
            "HF_HUB_OFFLINE": "1",
            "MUGS_WEBHOOK": "http://127.0.0.1:9/hook",
        }
        encoding = "utf-8"
        if kind == "profile":
            profile = self._damage(PROFILE)
        elif kind == "reproduction":
            reproduction = self._damage(REPRODUCTION)
        elif kind == "environment":
            for name in self.random.sample(VARIABLES, self.random.randint(1, 4)):
                value = self.random.choice([*WORDS, *self._paths()])
                # An empty home would make `/runs` of the profile's `$HOME/runs`.
                environment[name] = value or "x"
            encoding = self.random.choice(("utf-8", "ascii", "latin-1"))
        (self.work / "tiny.yaml").write_text(reproduction, "utf-8", errors="surrogateescape")
        (self.work / "cluster.yaml").write_text(profile, "utf-8", errors="surrogateescape")
        wild = 0.5 if kind == "command line" else 0.12
        return Case(kind, self._make_arguments(wild, kind), environment, encoding)

    def _write_slurm(self) -> str:
        """Return a PATH: with no Slurm, one that takes jobs, or one that says anything."""
        names = ("squeue", "sbatch", "scancel", "scontrol", "sacct", "sacctmgr", "srun")
        which = self.random.random()
        if which < 0.3:
            shutil.rmtree(self.folder / "bin", ignore_errors=True)
            return "/nowhere"
        scripts = dict.fromkeys(names, "exit 0")
        scripts["sbatch"] = "cat > /dev/null; echo 77"
        if which > 0.6:
            for name in self.random.sample(names, self.random.randint(1, len(names))):
                scripts[name] = self.random.choice(ANSWERS)
        return write_commands(self.folder / "bin", **scripts)

    def _make_arguments(self, wild: float, kind: str) -> list[str]:
        """Return a command with what it needs; with probability `wild`, each word is any word."""
        name = self.random.choice(sorted(COMMANDS))
        words = [name if self.random.random() > wild / 10 else self._word(name)]
        for parameter in COMMANDS[name].params:
            wanted = parameter.required or self.random.random() < 0.15
            if kind == "profile" and parameter.name == "cluster":
                wanted = True
            if parameter.name == "reproduction" and kind in ("reproduction", "command line"):
                wanted = True
            if parameter.name == "help" or not wanted:
                continue
            if parameter.param_type_name == "option":
                words.append(self.random.choice(parameter.opts))
                if getattr(parameter, "is_flag", False):
                    continue
            for _ in range(max(1, parameter.nargs)):
                words.append(self._value(name, parameter.name, wild))
        if self.random.random() < wild / 3:
            words.insert(self.random.randint(0, len(words)), self._word("x"))
        if self.random.random() < wild / 6:
            words.pop(self.random.randrange(len(words)))
        return [word.replace("\0", "") for word in words]

    def _value(self, command: str, name: str, wild: float) -> str:
        if self.random.random() < wild / 2:
            return self.random.choice([self._word(name), *self._paths()])
        usual = {
            "reproduction": ("tiny.yaml", "tiny.yaml", "tiny.yaml", "mini"),
            "cluster": ("cluster.yaml",),
            "overrides": (self._override(wild),),
            "only": ("knn", "pretrain", "convert", "photos"),
            "run": ("knn", "pretrain"),
            "run_root": ("../runs",),
            "explain": ("knn", "table1"),
            "table": ("table1", "1"),
            "out": ("out.safetensors", "out.html", "out"),
            "graph": ("text", "mermaid"),
            "arch": ("vit_s16",),
            "source": ("mugs", "timm", "ours"),
            "network": ("teacher", "student"),
            "format": ("md", "csv", "latex") if command == "tables" else ("timm", "safetensors"),
            "lines": ("3",),
            "ranks": ("1", "2"),
            "trace_steps": ("3",),
            "every": ("2",),
            "seeds": ("0", "1"),
            "to": ("tensorboard", "wandb", "mlflow", "trackio"),
            "margin": ("0.5", "3"),
        }
        return self.random.choice(usual.get(name, (*self._paths(), "1", "2", "teacher")))

    def _override(self, wild: float) -> str:
        if self.random.random() > wild * 2:
            return self.random.choice(("pretrain.epochs=3", "knn.ks=[1]", "photos.threads=1"))
        run = self.random.choice(("pretrain", "knn", "photos", "features", "nobody"))
        keys = (
            "epochs", "seed", "ks", "resources.hours", "resources", "mugs.drop_path", "arch",
            "train_dir", "batch_size", "method", "stage", "needs", "like", "temperatures",
        )  # fmt: skip
        return f"{run}.{self.random.choice(keys)}={self._word('x')}"

    def _word(self, word: str) -> str:
        """Return any word, or this one with a sign changed."""
        if self.random.random() < 0.7 or not word:
            return self.random.choice(WORDS)
        at = self.random.randrange(len(word))
        return word[:at] + self.random.choice(("", "-", "ä", " ", word[at] * 2)) + word[at + 1 :]

    def _paths(self) -> list[str]:
        """Return paths of all kinds. What may be written is in our folder only."""
        return [
            "tiny.yaml", "cluster.yaml", "data", "garbage", "empty", "new", "new/er/folder",
            "../runs", str(self.folder / "runs"), *OUTSIDE, "garbage/below",
            "~nosuchuser/x", "n" * 300, "line\nbreak", "\udce9", ".", "data/train/a/1.png",
        ]  # fmt: skip

    def _damage(self, text: str) -> str:
        """Return YAML with a value replaced, a key renamed, or lines and signs changed."""
        if self.random.random() < 0.6:
            content = yaml.safe_load(text)
            for _ in range(self.random.randint(1, 2)):
                self._change_node(content)
            with contextlib.suppress(yaml.YAMLError):
                return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        lines = text.splitlines()
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(lines))
            change = self.random.randrange(5)
            if change == 0:
                lines.pop(at)
            elif change == 1:
                lines.insert(at, self.random.choice(lines))
            elif change == 2:
                lines.insert(at, self._word("x"))
            else:
                line = lines[at]
                cut = self.random.randint(0, len(line))
                lines[at] = line[:cut] + self._word("x") + line[cut + change - 3 :]
            lines = lines or [""]
        return "\n".join(lines)

    def _change_node(self, node: Any) -> None:
        """Change a random place below a node."""
        places = [(owner, key) for owner, key in _walk(node)]
        if not places:
            return
        owner, key = self.random.choice(places)
        change = self.random.randrange(4)
        if change == 0 and isinstance(owner, dict):
            owner[self._word(str(key))] = owner.pop(key)
        elif change == 1:
            del owner[key]
        else:
            owner[key] = copy.deepcopy(self.random.choice(VALUES))


PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\x02"
    b"\0\x01H\xaf\xa4q\0\0\0\0IEND\xaeB`\x82"
)


def _walk(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in list(pairs):
        yield node, key
        yield from _walk(value)


@contextlib.contextmanager
def isolated(fuzzer: Fuzzer, case: Case) -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """Be a process of its own, as far as that goes: output, environment, folder, log handlers."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=case.encoding) for _ in range(2)]
    before = os.getcwd(), os.umask(0o022), sys.argv, logging.root.handlers[:], logging.root.level
    sys.argv = ["run_stage.py", *case.arguments]
    os.chdir(fuzzer.work)
    logging.root.handlers[:] = []
    ranks = SimpleNamespace(executable="/bin/false")
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.dict(os.environ, case.environment))
        enter(mock.patch("slurm.local.processes.sys", ranks))
        enter(mock.patch.object(socket.socket, "connect", _refuse))
        enter(mock.patch.object(socket, "getaddrinfo", _refuse))
        for module in ("status", "keeper", "watching", "submission.cancel", "submission.probe"):
            enter(mock.patch(f"slurm.{module}.time", _impatient_clock()))
        enter(mock.patch.dict(send_message.__kwdefaults__, pause=lambda _: None))
        # What it finds depends on no input, and it imports the packages in other processes.
        enter(mock.patch("pipeline.environment.check_environment", return_value=[]))
        enter(mock.patch("tempfile.tempdir", str(fuzzer.folder)))
        enter(mock.patch.object(sys, "dont_write_bytecode", True))
        enter(mock.patch.object(sys, "stdout", streams[0]))
        enter(mock.patch.object(sys, "stderr", streams[1]))
        enter(warnings.catch_warnings())
        try:
            yield streams[0], streams[1]
        finally:
            os.chdir(before[0])
            os.umask(before[1])
            sys.argv, logging.root.handlers[:] = before[2], before[3]
            logging.root.setLevel(before[4])
            logging.captureWarnings(False)


def _refuse(*_: object, **__: object) -> None:
    raise OSError("there is no network")


def _impatient_clock() -> SimpleNamespace:
    """Return a `time` whose third sleep ends with Ctrl-C, as users end `--watch`."""
    slept = Counter[str]()

    def sleep(_: float) -> None:
        slept["times"] += 1
        if slept["times"] > 2:
            sys.stderr.write("^C\n")  # as a terminal shows it
            raise KeyboardInterrupt

    return SimpleNamespace(**{**vars(time), "sleep": sleep})


def call(fuzzer: Fuzzer, case: Case) -> tuple[object, str]:
    """Return the exit code of a case, or what it raised or changed, and all that it printed."""
    code: object = "main returned"
    with isolated(fuzzer, case) as streams, fenced(fuzzer.folder) as refused:
        try:
            with time_limit(LIMIT_S):
                run_stage.main()
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        except BaseException as error:  # the point of it all
            code = f"{type(error).__name__}: {error}"
        said = ""
        for stream in streams:
            stream.flush()
            said += stream.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined]
    if strayed := [path for path in refused if not path.startswith(OUTSIDE)]:
        code = f"would have changed {', '.join(strayed[:3])}"
    return code, said


def judge(code: object, said: str) -> str:
    """Return what is wrong with an outcome; "" if nothing is."""
    if code not in DOCUMENTED:
        return f"exit code {code}: {said.strip().splitlines()[-1:]}"
    if "Traceback (most recent call last)" in said:
        return f"traceback: {said[-300:]}"
    if code and not said.strip():
        return f"exit code {code} without a word"
    return ""


def try_cases(
    count: int, seed: int, *, limit_s: float = float("inf"), show: Callable[[str], object] = str
) -> tuple[list[str], Counter[str]]:
    """Return the complaints about so many cases, and how often each kind and exit code came."""
    complaints = []
    seen: Counter[str] = Counter()
    end = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for index in range(count):
            if time.monotonic() > end:
                break
            # Each case has its own seed, so that one can be tried again alone.
            fuzzer = Fuzzer(folder / f"{index // 100}", seed * 100_000 + index)
            case = fuzzer.make_case(KINDS[index % len(KINDS)])
            code, said = call(fuzzer, case)
            seen[case.kind] += 1
            seen[f"code {code}"] += 1
            if wrong := judge(code, said):
                complaints.append(f"case {seed}/{index} {case.arguments!r}: {wrong}")
                show(complaints[-1])
    return complaints, seen


def run(count: int = 2000, seed: int = 1, limit_s: float = 2400.0) -> Outcome:
    """2,000 cases, or as many as there is time for."""
    complaints, seen = try_cases(count, seed, limit_s=limit_s)
    outcome = Outcome(NAME, sum(seen[kind] for kind in KINDS), complaints)
    outcome.expect(outcome.trials == count, f"only {outcome.trials} of {count} in {limit_s:.0f} s")
    # Else the cases would be too wild to reach anything.
    outcome.expect(seen["code 0"] > count / 10, f"only {seen['code 0']} of {count} were right")
    outcome.note = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
    return outcome
