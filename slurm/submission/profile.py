"""Cluster profiles: how the resources that a stage needs are spelled, and where runs are kept."""

import logging
import math
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline import reading
from pipeline.files import expand_home
from pipeline.provenance import code_root
from pipeline.reading import format_choices, parse_yaml, validate_model
from pipeline.spec import ConfigError, Resources, StageRun
from slurm.node.signals import LEAD_SECONDS_VARIABLE
from slurm.node.staging import STAGE_TO_VARIABLE
from slurm.shared.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE_ME

logger = logging.getLogger(__name__)
RUN_ROOT_VARIABLE = "MUGS_RUN_ROOT"
DEFAULT_RUN_ROOT = "~/mugs-runs"
KEEPER = "keeper"  # under `stages`: the small jobs that submit again what is missing
# fmt: off
RESERVED_OPTIONS = frozenset((
    "job-name", "time", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus",
    "gpus-per-node", "gpus-per-task", "gres", "mem", "mem-per-cpu", "mem-per-gpu", "dependency",
    "signal", "output", "error", "open-mode", "array", "requeue", "no-requeue",
    "kill-on-invalid-dep", "wckey", "partition", "account", "qos", "constraint", "nodelist",
    "exclude", "reservation", "exclusive", "wrap", "test-only", "parsable",
))
# fmt: on
"""sbatch options that have a key of their own or are set by `submit`, so not valid in `sbatch:`."""


_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_SLURM_WORD = re.compile(r"[A-Za-z0-9_.,:;\[\]&|*()!@+=/-]+")
_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
# Signs that would end a variable of the shell or of Python's path, or that Slurm replaces (`%j`).
_NO_RUN_ROOT = re.compile(r"[^\w/.+=@~, -]")


def _check_line(text: str) -> str:
    if any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in text):
        raise ValueError(f"expected one line without control characters, got {text!r}")
    return text


def _check_slurm_word(text: str) -> str:
    if not _SLURM_WORD.fullmatch(text):
        raise ValueError(f"expected letters, digits and any of _.,:;[]&|*()!@+=/-, got {text!r}")
    return text


def _check_variable_name(text: str) -> str:
    if not re.fullmatch(_VARIABLE, text):
        raise ValueError(f"expected the name of an environment variable, got {text!r}")
    return text


def _normalize_option(text: str) -> str:
    name = text.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"expected the long name of an option of sbatch, got {text!r}")
    # sbatch takes every beginning of a name that fits one option only.
    known = RESERVED_OPTIONS | ({"export"} - {name})  # `export` itself has its own message
    if taken := sorted(option for option in known if option.startswith(name)):
        raise ValueError(
            f"{text!r} is not an extra option, "
            f"--{taken[0]} has a key of its own or is set by submit"
        )
    return name


# What a profile may hold. All of it reaches a shell script, so nothing else may be in it than what
# the key is for.
Line = Annotated[str, AfterValidator(_check_line)]
SlurmWord = Annotated[str, AfterValidator(_check_slurm_word)]
VariableName = Annotated[str, AfterValidator(_check_variable_name)]
OptionName = Annotated[str, AfterValidator(_normalize_option)]


class JobOptions(BaseModel):
    """What a cluster profile says of jobs, and may say once more of the jobs of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Partition of the jobs.
    partition: SlurmWord | None = None
    # Account that is charged.
    account: SlurmWord | None = None
    # Quality of service.
    qos: SlurmWord | None = None
    # Features that nodes must have.
    constraint: SlurmWord | None = None
    # Nodes that must be used.
    nodelist: SlurmWord | None = None
    # Nodes that must not be used.
    exclude: SlurmWord | None = None
    # Reservation to run in.
    reservation: SlurmWord | None = None
    # Whether a job has its nodes for itself.
    exclusive: bool = False
    # Type in `--gpus-per-node=TYPE:N`; without it, any type is taken.
    gpu_type: SlurmWord | None = None
    # Name for `--gres=NAME:N`, such as `gpu` or `gpu:a100`, on clusters without `--gpus-per-node`.
    gres: SlurmWord | None = None
    # GPUs of a node. A run that asks for more of them on each node gets more nodes.
    gpus_per_node: int = Field(default=8, ge=0)
    # CPUs of each rank with a GPU; without it, what the run asks for. A --set of a run counts more.
    cpus_per_rank: int | None = Field(default=None, ge=1)
    # Memory of each node for runs that do not say how much they need; 0 for all of it.
    memory_gb: int | None = Field(default=None, ge=0)
    # Memory for each GPU of a job; for runs with GPUs it takes the place of `memory_gb`.
    memory_per_gpu_gb: int | None = Field(default=None, ge=1)
    # Longest time limit of a job. Longer runs are requeued and resume.
    max_hours: float | None = Field(default=None, gt=0)
    # Seconds between the warning and the end of a job, at most half of its time limit; without it,
    # an estimate from measured saves.
    signal_delay_s: int | None = Field(default=None, ge=1)
    # Shell lines before the job, such as `module load cuda`.
    setup: tuple[str, ...] = ()
    # Environment variables of the job.
    env: Mapping[VariableName, Line] = Field(default_factory=dict)
    # Folder on each node's own disk, such as `$TMPDIR`, to which converted data are copied before
    # they are read. Set it for the stages that read them often: `{pretrain: {stage_to: $TMPDIR}}`.
    stage_to: Line | None = None
    # Image for srun's `--container-image` (pyxis).
    container_image: Line | None = None
    # Mounts for srun's `--container-mounts`.
    container_mounts: Line | None = None
    # Words before the Python of each rank that start it in a container, without pyxis:
    # `apptainer exec --nv --bind /data image.sif`.
    container_command: Line | None = None
    # Python to start; without it, the one that submits.
    python: Line | None = None
    # Further options of sbatch, name to value; one that has a key of its own is refused.
    sbatch: Mapping[OptionName, Line | int | bool] = Field(default_factory=dict)
    # Further arguments of srun.
    srun: tuple[Line, ...] = ()

    @property
    def in_container(self) -> bool:
        """Whether the ranks of a job run in a container."""
        return bool(self.container_image or self.container_command)


class ClusterProfile(JobOptions):
    """One cluster, as read from `slurm/profiles/<name>.yaml` or a path.

    Every key reaches the batch script, except `gpus_per_node` and `max_at_once`, which are limits.
    `sbatch` and `srun` take further options. `signal_delay_s` is how many seconds before its end
    Slurm warns a job; unset, it is estimated (`slurm/submission/estimates.py`). `memory_gb: 0`
    means all of a node's memory.
    """

    # Folder that all nodes share and that holds all runs; `~` and `$VARIABLES` are expanded.
    run_root: Path
    # Most runs of a reproduction in the queue at a time; a keeper submits the next one when one of
    # them ends. `submit --at-once` counts more.
    max_at_once: int | None = Field(default=None, ge=1)
    # Keys that differ for the jobs of a stage: `{convert: {partition: cpu, memory_gb: 64}}`; those
    # of `keeper` are for the jobs that submit again what is missing.
    stages: Mapping[str, JobOptions] = Field(default_factory=dict)


def profile_of_run(profile: ClusterProfile, run: StageRun) -> ClusterProfile:
    """Return the profile for the jobs of one run: what it says of the run's stage counts more.

    `env` and `sbatch` of the stage add to those of the profile; other keys take their place.
    """
    return profile_of_stage(profile, run.stage, gpu=run.resources.gpu)


def profile_of_stage(profile: ClusterProfile, stage: str, *, gpu: bool) -> ClusterProfile:
    """Return the profile for the jobs of a stage, with or without GPUs."""
    own = profile.stages.get(stage)
    changes = {key: getattr(own, key) for key in own.model_fields_set} if own else {}
    for key in ("env", "sbatch"):
        if key in changes:
            changes[key] = {**getattr(profile, key), **changes[key]}
    # CPUs per rank of a profile are the share of one GPU; a conversion has one rank and wants many.
    if not gpu:
        changes.setdefault("cpus_per_rank", None)
    return profile.model_copy(update={**changes, "stages": {}})


def load_profile(name_or_path: str) -> ClusterProfile:
    """Read and check a profile by bundled name or path; expand `~` and `$VARIABLES` in `run_root`.

    Raises:
        ConfigError: names the file, the key and what is expected.
    """
    source, text = reading.find_yaml(name_or_path, "slurm", "profiles", what="cluster profile")
    values = parse_yaml(source, text)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: expected a mapping{format_choices('', ClusterProfile.model_fields)}"
        )
    profile = validate_model(ClusterProfile, values, source)
    for env in (profile.env, *(own.env for own in profile.stages.values())):
        _warn_of_secrets(source, tuple(env))
    _check_options(profile, source)
    for stage, own in profile.stages.items():
        _check_options(own, f"{source}: stages: {stage}", image=profile.container_image)
    root = expand_home(os.path.expandvars(profile.run_root))
    if "$" in str(root) or not root.is_absolute():
        raise ConfigError(
            f"{source}: run_root: expected an absolute path with known variables, got {str(root)!r}"
        )
    return profile.model_copy(update={"run_root": check_run_root(root, source)})


def load_local_environment(name_or_path: str) -> dict[str, str]:
    """Return the variables that a profile gives to the ranks of this machine.

    What they refer to (`$HOME`) is filled in, as the shell does it in a job.
    """
    env = load_profile(name_or_path).env
    return {name: os.path.expandvars(value) for name, value in env.items()}


def check_stage_names(profile: ClusterProfile, stages: Iterable[str]) -> None:
    """Raise ConfigError if the profile has options for a stage that does not exist."""
    known = {*stages, KEEPER}
    if unknown := sorted(set(profile.stages) - known):
        raise ConfigError(
            f"cluster profile: stages: there is no stage {unknown[0]!r}"
            f"{format_choices(unknown[0], known)}"
        )


def check_run_root(root: Path, source: str) -> Path:
    """Return a run root, or raise ConfigError if Slurm would read it in another way."""
    # sbatch and srun fill in %j and its like in the paths of output files.
    if "%" in str(root) or "\\" in str(root):
        raise ConfigError(
            f"{source}: run_root: '%' and '\\' mean something to Slurm in paths of logs, so choose "
            f"a folder without them, got {str(root)!r}"
        )
    return root


def _check_options(options: JobOptions, source: str, image: str | None = None) -> None:
    """Raise ConfigError if the options of a profile or of one of its stages contradict."""
    if "export" in options.sbatch:
        raise ConfigError(
            f"{source}: sbatch: export would take the environment from the ranks; "
            "set variables under env"
        )
    if options.container_mounts and not (options.container_image or image):
        raise ConfigError(f"{source}: container_mounts: expected container_image beside it")
    if options.container_command and (options.container_image or image):
        raise ConfigError(
            f"{source}: container_command: not with container_image, which starts the container "
            "through pyxis"
        )
    if options.gres and options.gpu_type:
        raise ConfigError(
            f"{source}: gpu_type: not with gres, which names the type itself "
            f"(gres: gpu:{options.gpu_type})"
        )


@cache
def _warn_of_secrets(source: str, names: Sequence[str]) -> None:
    """Log which variables of a profile look like secrets, once."""
    if secret := sorted(name for name in names if _SECRET.search(name)):
        logger.warning(
            "%s: env: %s will stand in the batch script, which administrators of the cluster can "
            "read; rather read it in `setup` from a file that only you can read",
            source,
            ", ".join(secret),
        )


def find_gpu_shortages(profile: ClusterProfile, runs: Iterable[StageRun]) -> list[str]:
    """Return a line for each run whose GPUs cannot be spread evenly over the cluster's nodes."""
    return [
        f"{run.name}.resources.ranks_per_node: {run.resources.ranks} GPUs cannot be spread evenly "
        f"over nodes with {limit} each (gpus_per_node of the profile)"
        for run in runs
        for limit in [profile_of_run(profile, run).gpus_per_node]
        if run.resources.gpu
        and run.resources.ranks_per_node > limit
        and (limit == 0 or run.resources.ranks % limit)
    ]


def find_crowded_cpus(profile: ClusterProfile | None, runs: Iterable[StageRun]) -> list[str]:
    """Return a line for the runs that have more loader threads than CPUs for each rank.

    Without a profile, the CPUs are those that the runs ask for.
    """
    crowded: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        decided = (
            find_profile_resources(profile_of_run(profile, run), run.resources) if profile else {}
        )
        cpus = decided.get("cpus_per_rank", run.resources.cpus_per_rank)
        # Not every stage has this setting.
        threads = getattr(run.config, "threads", 0)
        if threads > cpus:
            crowded.setdefault((threads, cpus), []).append(run.name)
    return [
        f"note: {', '.join(names)}: threads is {threads}, but a rank has {cpus} CPUs "
        f"(cpus_per_rank), which take turns: set threads to {cpus}, or ask for more CPUs"
        for (threads, cpus), names in crowded.items()
    ]


def fold_ranks(profile: ClusterProfile, need: Resources) -> Resources:
    """Return what a run needs on nodes with fewer GPUs than it asks for on each: more nodes.

    The number of ranks stays, and with it the batch of each rank.
    """
    limit = profile.gpus_per_node
    if not need.gpu or need.ranks_per_node <= limit or limit == 0 or need.ranks % limit:
        return need
    memory = need.memory_gb
    if memory is not None:
        memory = math.ceil(memory * limit / need.ranks_per_node)
    return need.model_copy(
        update={"nodes": need.ranks // limit, "ranks_per_node": limit, "memory_gb": memory}
    )


def time_limit_minutes(profile: ClusterProfile, need: Resources) -> int:
    """Return the time limit of one job: the run's hours, at most the cluster's.

    A run that takes longer is requeued and resumes.
    """
    return max(1, math.ceil(60 * min(need.hours, profile.max_hours or need.hours)))


def job_command(profile: ClusterProfile, run_dir: Path) -> str:
    """Return the command that srun starts on every rank."""
    return _command_of_ranks(profile, "slurm.node.job", run_dir)


def probe_command(profile: ClusterProfile, folder: Path) -> str:
    """Return the command that srun starts on every rank of a probe."""
    return _command_of_ranks(profile, "slurm.node.probe", folder)


def _command_of_ranks(profile: ClusterProfile, module: str, folder: Path) -> str:
    container = f"{profile.container_command} " if profile.container_command else ""
    return f"{container}{_python(profile)} -u -m {module} {shlex.quote(str(folder))}"


def keeper_command(profile: ClusterProfile, note: Path, sha256: str) -> str:
    """Return the command of a keeper's job. It runs outside of containers, where Slurm is."""
    return f"{_python_outside(profile)} -u -m slurm.keeper {shlex.quote(str(note))} {sha256}"


def exit_handler_lines(profile: ClusterProfile, run_dir: Path) -> list[str]:
    """Return the shell lines after srun, which decide about a retry.

    They run outside of the container, with the Python that submits: the profile's one may be in the
    image only. The shell itself requeues a job that was interrupted where the handler cannot,
    because there is no such Python, or none with a `scontrol` beside it. It asks for the state
    first: a job that is being canceled must stay ended.
    """
    handler = f"{_python_outside(profile)} -m slurm.node.on_exit {shlex.quote(str(run_dir))} $code"
    return [
        "code=$?",
        "[ $code -eq 0 ] && exit 0",
        f"{handler}",
        "decision=$?",
        f"if [ $decision -eq {EXIT_REQUEUE_ME} ] ||"
        f" {{ [ $code -eq {EXIT_INTERRUPTED} ] && [ $decision -ne {EXIT_INTERRUPTED} ]"
        " && [ $decision -ne 0 ]; }; then",
        '  scontrol -o show job "$SLURM_JOB_ID" | grep -q "JobState=RUNNING"'
        ' && scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "[ $decision -eq 0 ] && exit 0",
        "exit $code",
    ]


def _python(profile: ClusterProfile) -> str:
    return profile.python or shlex.quote(sys.executable)


def _python_outside(profile: ClusterProfile) -> str:
    return shlex.quote(sys.executable) if profile.in_container else _python(profile)


def find_profile_resources(profile: ClusterProfile, need: Resources) -> dict[str, int]:
    """Return the resources of a run that the profile decides, with their values."""
    folded = fold_ranks(profile, need)
    decided: dict[str, int] = {
        name: getattr(folded, name)
        for name in ("nodes", "ranks_per_node", "memory_gb")
        if getattr(folded, name) != getattr(need, name)
    }
    if profile.cpus_per_rank is not None and not need.overrides_profile("cpus_per_rank"):
        decided["cpus_per_rank"] = profile.cpus_per_rank
    memory = profile.memory_gb
    if need.gpu and profile.memory_per_gpu_gb is not None:
        memory = profile.memory_per_gpu_gb * folded.ranks_per_node
    if need.memory_gb is None and memory is not None:
        decided["memory_gb"] = memory
    return decided


def sbatch_parameters(
    profile: ClusterProfile, need: Resources, *, code: Path, lead_s: int
) -> dict[str, Any]:
    """Return the parameters of `submitit.SlurmExecutor` for one run, except name and dependencies.

    Slurm warns the job `lead_s` seconds before its end. `code` is the snapshot that it runs.
    """
    need = fold_ranks(profile, need)
    decided = find_profile_resources(profile, need)
    cpus = decided.get("cpus_per_rank", need.cpus_per_rank)
    gpu_type = f"{profile.gpu_type}:" if profile.gpu_type else ""
    additional = {
        "requeue": True,
        # A job whose input failed would otherwise stay in the queue for ever.
        "kill-on-invalid-dep": "yes",
        "reservation": profile.reservation or None,
        **profile.sbatch,
        "gpus-per-node": None,
        "gres": None,
    }
    if need.gpu and profile.gres:
        additional["gres"] = f"{profile.gres}:{need.ranks_per_node}"
    elif need.gpu:
        additional["gpus-per-node"] = f"{gpu_type}{need.ranks_per_node}"
    srun = {
        # srun does not inherit this from the job since Slurm 22.05.
        "cpus-per-task": cpus,
        # The other ranks of one that died would wait for it in a collective operation for ever.
        "kill-on-bad-exit": 1,
        "container-image": profile.container_image,
        "container-mounts": profile.container_mounts,
    }
    memory = decided.get("memory_gb", need.memory_gb)
    return {
        "time": time_limit_minutes(profile, need),
        "nodes": need.nodes,
        "ntasks_per_node": need.ranks_per_node,
        "cpus_per_task": cpus,
        "signal_delay_s": lead_s,
        "setup": [
            *map(_stop_if_it_fails, profile.setup),
            # Else `set -e` among them would end the script before it can look at how srun ended.
            *(("set +eu",) if profile.setup else ()),
            *(f"export {key}={_quote(value)}" for key, value in profile.env.items()),
            f"export MUGS_RUN_ROOT={shlex.quote(str(profile.run_root))}",
            f"export {LEAD_SECONDS_VARIABLE}={lead_s}",
            # Each rank fills in variables, since nodes may have other ones.
            *(
                [f"export {STAGE_TO_VARIABLE}={shlex.quote(profile.stage_to)}"]
                if profile.stage_to
                else []
            ),
            # The snapshot comes first on the path, before what the profile may add: a requeued job
            # runs the code that it was submitted with.
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1"
            "  # else the folder of the submission would come before the snapshot",
        ],
        "srun_args": [
            *(f"--{option}={value}" for option, value in srun.items() if value),
            *profile.srun,
        ],
        # Of an option that is off or unset, nothing is written. A number may be 0.
        "additional_parameters": {
            option: value
            for option, value in additional.items()
            if value is not None and value is not False
        },
        "wckey": None,  # clusters that enforce keys reject the default of submitit
        # submitit leaves out what is None.
        "mem": None if memory is None else f"{memory}GB" if memory else "0",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodelist": profile.nodelist,
        "exclude": profile.exclude,
        "exclusive": profile.exclusive or None,
    }


def _stop_if_it_fails(line: str) -> str:
    """Return a line of `setup` that ends the job if it loads software that is not there.

    Other lines may fail: `source ~/.bashrc` often does, and the job is fine.
    """
    if not re.match(r"(module|ml|spack)\s", line):
        return line
    return f"{line} || {{ echo {shlex.quote(f'setup failed: {line}')} >&2; exit 1; }}"


def _quote(value: str) -> str:
    """Return a value in double quotes. Of what a shell expands there, only variables are left."""
    escaped = re.sub(r'([\\"`])', r"\\\1", value)
    escaped = re.sub(rf"\$(?!{_VARIABLE}|\{{{_VARIABLE}\}})", r"\\$", escaped)
    return f'"{escaped}"'


def choose_run_root(given: Path | None, cluster: str | None) -> Path:
    """Return the given run root, else the profile's, else MUGS_RUN_ROOT, else ~/mugs-runs.

    Raises:
        ConfigError: there is no such profile, or the run root is inside the checkout.
    """
    profile = None if cluster is None else load_profile(cluster)  # also checked if not needed
    if given is not None:
        return _find_absolute(given, "--run-root")
    chosen = os.environ.get(RUN_ROOT_VARIABLE)
    root = (
        profile.run_root
        if profile
        else _find_absolute(
            chosen or DEFAULT_RUN_ROOT, RUN_ROOT_VARIABLE if chosen else "the default run root"
        )
    )
    if root.is_relative_to(code_root()):
        raise ConfigError(f"run root {root} is inside the checkout; name another with --run-root")
    return root


def _find_absolute(path: str | Path, source: str) -> Path:
    expanded = expand_home(path)
    if str(expanded).startswith("~"):
        raise ConfigError(f"{source} {path}: no such home folder is known; give an absolute path")
    return expanded.absolute()


def load_profile_at(
    cluster: str, given: Path | None, *, max_at_once: int | None = None
) -> ClusterProfile:
    """Return the cluster's profile with the run root that `choose_run_root` chooses.

    `max_at_once` takes the place of that of the profile.
    """
    root = check_run_root(choose_run_root(given, cluster), "--run-root")
    if found := _NO_RUN_ROOT.search(str(root)):
        raise ConfigError(
            f"run root {str(root)!r}: jobs cannot use a path with {found[0]!r}; expected letters, "
            "digits, spaces and any of /._+=@~,-"
        )
    limit = {} if max_at_once is None else {"max_at_once": max_at_once}
    return load_profile(cluster).model_copy(update={"run_root": root, **limit})
