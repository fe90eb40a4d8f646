"""Write configuration.md and cluster_profiles.md from the settings classes: `make docs`.

    python docs/generate.py [--check]    --check writes nothing and exits with 1 if a page is old

The meaning of a setting is the comment above its field. Its limits, its default and whether it
belongs to the run id are read from the class, so they cannot be out of date.
"""

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mugs.methods.config import MethodSettings  # noqa: E402
from pipeline.settings import Mark, Settings, setting_fields  # noqa: E402
from pipeline.spec import Resources, StageSpec  # noqa: E402
from slurm.submission.profile import ClusterProfile  # noqa: E402
from stages import STAGES  # noqa: E402

LIMITS: dict[type, Callable[[Any], str]] = {
    Ge: lambda limit: f"≥ {limit.ge:g}",
    Gt: lambda limit: f"> {limit.gt:g}",
    Le: lambda limit: f"≤ {limit.le:g}",
    Lt: lambda limit: f"< {limit.lt:g}",
    MultipleOf: lambda limit: f"multiple of {limit.multiple_of}",
}
TYPES = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "`true`, `false`",
    Path: "path",
    NoneType: "`null`",
}
# What a setting means that several classes have; a comment above the field is more precise.
SHARED = {
    "activation_checkpointing": "Compute activations again in the backward pass, to save memory.",
    "arch": "Architecture of the backbone: `vit_s16`, `vit_b16`, `vit_l16`, `vit_mini`.",
    "batch_size": "Images per optimizer step, over all ranks.",
    "checkpoint_steps": "Steps between two checkpoints.",
    "compile": "Compile the network with torch.compile.",
    "crop": "Side of the center crop.",
    "data_dir": "Folder of the data set.",
    "dataset": "Name in result rows and tables.",
    "drop_path": "Stochastic depth of the last block; it grows linearly from 0 at the first.",
    "epochs": "Epochs of training.",
    "eval_batch_size": "Images that go through the network together.",
    "feature": "Which tokens of the backbone make up the feature of an image.",
    "final_lr": "Last value of the cosine.",
    "ks": "Numbers of neighbors; each gives rows of its own.",
    "log_steps": "Steps between two lines of metrics.jsonl.",
    "memory_mb": "Memory for the similarities of one block of images.",
    "micro_batch_size": "Largest micro-batch of a rank; without it, its whole share of the batch.",
    "num_classes": "Expected number of classes.",
    "num_pictures": "Number of example pictures that are written.",
    "num_train_images": "Expected number of training images.",
    "num_val_images": "Expected number of validation images.",
    "precision": "`bf16` uses autocast; weights and optimizer stay in fp32.",
    "resize": "Shorter side to which images are resized before the crop.",
    "seed": "Seed of all random numbers of the run.",
    "temperatures": "Temperatures of the vote; each gives rows of its own (E2).",
    "threads": "Threads or worker processes of each rank that read and decode files.",
    "weight_decay": "Weight decay of all tensors with more than one dimension.",
    "weights": "Which network of the run that fills the role `weights`.",
    "workers": "Processes of each rank that read and prepare images.",
}
SETTINGS_HEAD = "| setting | values | default | run id | meaning |\n|---|---|---|---|---|\n"
PLAIN_HEAD = "| key | values | default | meaning |\n|---|---|---|---|\n"
GENERATED = "<!-- Written by docs/generate.py; change the classes and run `make docs`. -->\n\n"
CONFIGURATION = """# Settings of all stages

A run of a reproduction names its stage and sets what differs from the defaults:

```yaml
runs:
  pretrain:
    stage: pretrain
    needs: {data: imagenet}
    epochs: 100
    batch_size: 512
    mugs: {drop_path: 0.1}
```

Any setting can be changed on the command line: `--set pretrain.mugs.drop_path=0.2`, where the first
word is the name of the run. Unknown names and values outside the limits are refused before anything
starts.

**run id**: a setting marked "yes" can change a result, so another value makes another run. A
setting marked "no" (paths, threads, intervals) cannot, and may differ from one start to the next.

Every run may also have `resources`, which say what it needs from the cluster:

"""
PROFILES = """# Cluster profiles

A cluster profile says once how your cluster wants its jobs. On a login node, this writes a first
one from what Slurm says of partitions, nodes, limits and your accounts:

    python run_stage.py init-cluster my_cluster.yaml

Or copy the one of `slurm/profiles/` that is most like your cluster, and change it:

| profile | cluster |
|---|---|
| `a100_8x80g` | nodes with 8 A100 80 GB |
| `a100_8x_gres` | jobs ask for GPUs with `--gres`; a partition of its own for conversions |
| `a100_4x40g` | nodes with 4 A100 40 GB |
| `preemptible` | short jobs that are stopped for others and queued again |
| `modules_conda` | software from modules and a conda environment |
| `container_pyxis` | containers of pyxis and enroot; `slurm/images/Dockerfile` makes an image |
| `container_apptainer` | containers of apptainer; `slurm/images/apptainer.def` makes an image |
| `workstation` | one machine without Slurm, for `run` |

Give its path with `--cluster`, and check it first with `doctor REPRODUCTION --cluster FILE`. With
`--probe`, it also runs a job of a few minutes on at most two nodes, which measures GPUs, the links
between them, disks and clocks; below each problem stands what to change in the profile. A
profile changes where and how jobs run, never their results: no key is part of a run id. Every key
except `gpus_per_node` and `max_at_once`, which are limits, reaches the batch script; an unknown key
is refused. See `slurm/README.md` for what a job survives.

To try a profile without GPUs and without data of yours, submit the demo:
`submit mini --cluster FILE` takes CPUs only, and ends in some minutes. Runs that need nothing of
each other start at the same time; `--at-once 4` has at most four in the queue. On nodes without
GPUs:

```yaml
partition: cpu
gpus_per_node: 0
memory_gb: 4
max_hours: 4
```

All keys but `run_root` may differ for the jobs of a stage. Here conversions run on nodes without
GPUs:

```yaml
partition: gpu
cpus_per_rank: 12
memory_per_gpu_gb: 100
stages:
  convert: {partition: cpu, memory_gb: 64}
```

A run that asks for 8 GPUs of one node gets two nodes where `gpus_per_node` is 4. If a `module load`
(or `ml`, `spack`) of `setup` fails, the job ends there, and its log says so. `set -e` and `set -u`
in `setup` hold for its lines only.

"""


def comments_of(cls: type) -> dict[str, str]:
    """Return the comment above each field, of the class and of those it inherits from."""
    found = dict(SHARED)
    for one in reversed(cls.__mro__):
        # The class with a field for each method is made by a call and has no source.
        made = one is MethodSettings
        if not issubclass(one, Settings | BaseModel) or one in (Settings, BaseModel) or made:
            continue
        commented = re.findall(r"((?:^ {4}#.*\n)+) {4}(\w+):", inspect.getsource(one), re.MULTILINE)
        for comment, name in commented:
            found[name] = " ".join(line.strip(" #") for line in comment.splitlines())
    return found


def values(hint: Any) -> str:
    """Return the type of a setting with its limits, in words."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        limits = [text for mark in hint.__metadata__ for text in limits_of(mark)]
        return " ".join([values(hint.__origin__), *limits])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if origin in (typing.Union, UnionType):
        return " or ".join(values(option) for option in typing.get_args(hint))
    if origin is tuple:
        *first, last = typing.get_args(hint)
        if last is Ellipsis:
            return f"list of {values(first[0])}"
        return "[" + ", ".join(values(item) for item in (*first, last)) + "]"
    if origin is not None and issubclass(origin, Mapping):
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, Settings):
        return "settings, see below"
    return TYPES[hint]


def limits_of(mark: Any) -> list[str]:
    """Return the limits in one item of an annotation; pydantic nests them in a FieldInfo."""
    if isinstance(mark, FieldInfo):
        return [text for inner in mark.metadata for text in limits_of(inner)]
    return [LIMITS[type(mark)](mark)] if type(mark) in LIMITS else []


def literal(value: Any) -> str:
    """Return a default as YAML has it; without one, that a value is required."""
    if value is dataclasses.MISSING or value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, Settings):
        return ""
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"`[{value[0]}, {value[1]}, ..., {value[-1]}]`"
    text = str(value).replace("'", "").replace("(", "[").replace(",)", "]").replace(")", "]")
    return f"`{text}`" if text else '`""`'


def meaning(comment: str) -> str:
    """Return a comment as a cell: rows of deviations become links."""
    linked = re.sub(
        r"\b([ME]\d{1,2})\b", lambda row: f"[{row[1]}](deviations.md#{row[1].lower()})", comment
    )
    return linked.replace("|", "\\|")


def describe(cls: type) -> str:
    """Return the docstring of a class as paragraphs."""
    return inspect.cleandoc(cls.__doc__ or "") + "\n\n"


def settings_table(cls: type[Settings], path: str) -> Iterator[str]:
    """Write a table of the settings of a class, then those of the classes it holds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    comments = comments_of(cls)
    shown = setting_fields(cls)
    yield SETTINGS_HEAD
    for name, setting in shown.items():
        in_id = "no" if setting.runtime else "yes"
        if Mark.ADDED in setting.marks:
            in_id = "unless default"
        needed = Mark.REQUIRED_AT_RUN in setting.marks
        default = "needed to run" if needed else literal(setting.default)
        cells = (f"`{name}`", values(hints[name]), default, in_id, meaning(comments.get(name, "")))
        yield f"| {' | '.join(cells)} |\n"
    yield "\n"
    for name, setting in shown.items():
        if setting.nested is not None:
            yield f"### {path}.{name}\n\n"
            yield describe(setting.nested)
            yield from settings_table(setting.nested, f"{path}.{name}")


def model_table(model: type[BaseModel]) -> Iterator[str]:
    """Write a table of the fields of a model."""
    comments = comments_of(model)
    yield PLAIN_HEAD
    for name, field in model.model_fields.items():
        limits = [text for mark in field.metadata for text in limits_of(mark)]
        kind, _, null = values(field.annotation).partition(" or ")
        kind = " ".join([kind, *limits]) + (f" or {null}" if null else "")
        default = literal(field.get_default(call_default_factory=True))
        yield f"| `{name}` | {kind} | {default} | {meaning(comments.get(name, ''))} |\n"
    yield "\n"


def stage_section(spec: StageSpec) -> Iterator[str]:
    """Write what one stage needs and all its settings."""
    yield f"## {spec.name}\n\n"
    yield describe(spec.config)
    if spec.needs:
        yield f"Needs: {', '.join(describe_role(spec, role) for role in spec.needs)}.\n\n"
    if changed := spec.resources.model_dump(exclude_defaults=True):
        listed = ", ".join(f"`{name}: {literal(value)[1:-1]}`" for name, value in changed.items())
        yield f"Default resources: {listed}.\n\n"
    yield from settings_table(spec.config, spec.name)


def describe_role(spec: StageSpec, role: str) -> str:
    """Return a role and the stages that may fill it."""
    optional = " (optional)" if spec.optional(role) else ""
    return f"`{role}`{optional} from " + " or ".join(f"`{name}`" for name in spec.fillers(role))


def configuration_page() -> Iterator[str]:
    """Write configuration.md."""
    yield GENERATED + CONFIGURATION
    yield from model_table(Resources)
    for spec in STAGES.values():
        yield from stage_section(spec)


def profiles_page() -> Iterator[str]:
    """Write cluster_profiles.md."""
    yield GENERATED + PROFILES
    yield from model_table(ClusterProfile)


PAGES = {"configuration.md": configuration_page, "cluster_profiles.md": profiles_page}


def main(arguments: list[str]) -> int:
    """Write the pages, or name those that are old."""
    pages = {HERE / name: "".join(page()).rstrip("\n") + "\n" for name, page in PAGES.items()}
    old = {
        path: text
        for path, text in pages.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if "--check" not in arguments:
        for path, text in old.items():
            path.write_text(text, encoding="utf-8")
    elif old:
        names = ", ".join(path.name for path in old)
        sys.stderr.write(f"docs: {names} not up to date; run `make docs`\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
