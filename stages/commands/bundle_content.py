"""What is in a bundle: the names of its files, and what is written into them.

    bundle.json                     what this is: the runs, and those that are not done
    checksums.sha256                SHA-256 of each other file, as `sha256sum --check` reads it
    reproduction.yaml               every run with every setting, without paths
    rows.csv, runs.json             results and runs, as `tables --publish` writes them
    tables/TABLE.md .tex .csv       with verdicts
    report.html                     as the command `report` writes it, without paths
    records/STAGE/NAME-ID/          entry.json, attempts.json, rows.csv, metrics.jsonl
    weights/STAGE/NAME-ID/          backbones
    ro-crate-metadata.json          the same for programs that know RO-Crate

`verify` works out most of it again from the rest and compares, so both commands use this module.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from pipeline import attempts
from pipeline.files import with_checksum
from pipeline.identity import RETIRED_SETTINGS, dump_settings, runtime_names, science_fields
from pipeline.inputs import list_input_paths
from pipeline.manifest import ManifestEntry
from pipeline.reading import validate_model
from pipeline.spec import PlainName, StageRun
from results import render, spec
from results.collect import CollectedResults
from results.render import SUFFIX
from results.runs import FinishedRun, run_from_entry
from results.tables import build_tables
from results.verdict import DEFAULT_MARGIN
from stages import STAGES

FORMAT_VERSION = 1
# In the head of every bundle, by which we know that it may be replaced.
MARK: Final = "mugs-repro bundle"

BUNDLE = "bundle.json"
CHECKSUMS = "checksums.sha256"
REPRODUCTION = "reproduction.yaml"
ROWS = "rows.csv"
RUNS = "runs.json"
REPORT = "report.html"
CRATE = "ro-crate-metadata.json"
ENTRY = "entry.json"
ATTEMPTS = "attempts.json"
METRICS = "metrics.jsonl"
SINGLE_FILES = (BUNDLE, CHECKSUMS, REPRODUCTION, ROWS, RUNS, REPORT, CRATE)
RECORD_FILES = (ENTRY, ATTEMPTS, ROWS, METRICS)

# Of an attempt, what tells with which code, packages and machines numbers were made. Host, process,
# command and folders are left out.
KEPT_PROVENANCE = (
    "git_sha",
    "git_dirty",
    "snapshot",
    "versions",
    "platform",
    "environment",
    "energy",
    "earlier",
    "inputs",
    "started",
)
# Values of the user's environment, however harmless their names are.
LEFT_OUT_ENVIRONMENT = ("variables",)

# An absolute path, or one in a home; a name follows after its last slash. In an address such as
# https://host/path, no slash is the first one.
_PATH = re.compile(
    r"(?<![\w.:/~])(?:~[\w.-]*)?/(?:[^\s/'\"`:;,()\[\]{}<>]+/)*([^\s/'\"`:;,()\[\]{}<>]+)"
)


class BundleFile(BaseModel):
    """Content of `bundle.json`; `runs` are the folders of the finished runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = FORMAT_VERSION
    written_by: Literal["mugs-repro bundle"] = MARK
    reproduction: PlainName
    runs: list[str] = Field(max_length=20_000)
    not_done: list[str] = Field(max_length=20_000)


def hide_paths(value: Any, hidden: Sequence[str] = ()) -> Any:
    """Return JSON-able content with `.../name` for each path; `hidden` folders become `...`.

    A path tells names of users, groups and projects.
    """
    if isinstance(value, Mapping):
        return {key: hide_paths(item, hidden) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_paths(item, hidden) for item in value]
    if not isinstance(value, str):
        return value
    # Whole folders first: their names may have spaces, at which the pattern ends.
    for folder in hidden:
        value = value.replace(folder, "...")
    return _PATH.sub(r".../\1", value)


def list_hidden_folders(root: Path) -> list[str]:
    """Return the folders whose names do not leave this machine, the longest first."""
    folders = {str(root.absolute()), str(root.resolve()), os.path.expanduser("~")}
    return sorted(folders - {"/", "~"}, key=lambda folder: (-len(folder), folder))


def clean_entry(entry: ManifestEntry, hidden: Sequence[str]) -> ManifestEntry:
    """Return the entry of a run without paths, hosts, and values of the environment."""
    provenance = {key: entry.provenance[key] for key in KEPT_PROVENANCE if key in entry.provenance}
    environment = provenance.get("environment")
    if isinstance(environment, Mapping):
        provenance["environment"] = {
            key: value for key, value in environment.items() if key not in LEFT_OUT_ENVIRONMENT
        }
    return entry.model_copy(
        update={
            "config": hide_paths(entry.config, hidden),
            "info": hide_paths(entry.info, hidden),
            "provenance": hide_paths(provenance, hidden),
        }
    )


def format_entry(entry: ManifestEntry) -> bytes:
    """Return the content of the record of a run, which holds its own checksum."""
    return format_json(with_checksum(entry.model_dump(mode="json")))


def format_json(value: Any) -> bytes:
    """Return a value as JSON that people can read."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def describe_attempts(run_dir: Path, hidden: Sequence[str]) -> list[dict[str, Any]]:
    """Return when each attempt of a run began, on what, and how it ended if it did not succeed."""
    found = []
    for number in attempts.list_attempts(run_dir):
        begun = attempts.read_attempt(run_dir, number)
        facts: dict[str, Any] = {"attempt": number}
        facts |= {key: begun[key] for key in ("time", "ranks", "gpus", "job_id") if key in begun}
        if failure := attempts.read_failure(run_dir, number):
            facts["failed"] = {"error": failure.error, "time": failure.time, "step": failure.step}
        if (reason := attempts.read_interruption(run_dir, number)) is not None:
            facts["interrupted"] = reason
        if energy := attempts.list_energy(run_dir, number):
            facts["joules"] = sorted(energy.values())
        found.append(hide_paths(facts, hidden))
    return found


def format_reproduction(name: str, runs: Sequence[StageRun]) -> bytes:
    """Return a reproduction that has every setting of every run, and no path.

    Whoever plans it gets the same run ids, whatever defaults and recipes say by then.
    """
    names = {run.run_id: run.name for run in runs}
    content = {
        run.name: {
            "stage": run.stage,
            "needs": {role: names[need] for role, need in sorted(run.needs.items())},
            "resources": run.resources.model_dump(mode="json", exclude_defaults=True),
            **_settings_without_paths(run),
        }
        for run in runs
    }
    text = yaml.safe_dump({"name": name, "runs": content}, sort_keys=False, allow_unicode=True)
    return text.encode()


def _settings_without_paths(run: StageRun) -> dict[str, Any]:
    settings = dump_settings(run.config)
    for dotted, value in list_input_paths(run.config):
        # Data that come with a package are the same everywhere.
        if not value.startswith("builtin:"):
            *outer, last = dotted.split(".")
            group = settings
            for part in outer:
                group = group[part]
            group.pop(last, None)
    return settings


def read_science(entry: ManifestEntry) -> dict[str, Any]:
    """Return the settings of a run that can change a result, as its run id is made of them.

    So a setting that older code did not have makes no difference.

    Raises:
        ConfigError: its stage has no such settings.
    """
    recorded = {key: value for key, value in entry.config.items() if key not in RETIRED_SETTINGS}
    where = record_folder(entry)
    found: dict[str, Any] = science_fields(
        validate_model(STAGES[entry.stage].config, recorded, where)
    )
    return found


def read_finished_runs(entries: Iterable[ManifestEntry]) -> dict[str, FinishedRun]:
    """Return the runs of entries, by id, as tables and report take them."""
    return {
        entry.run_id: run_from_entry(
            entry.model_dump(mode="json"),
            runtime_names(STAGES[entry.stage].config) | RETIRED_SETTINGS,
        )
        for entry in entries
    }


def render_tables(collection: CollectedResults) -> dict[str, bytes]:
    """Return each table in each format, with verdicts, by the name of its file."""
    return {
        f"tables/{table.name}.{suffix}": render.render_table(table, fmt, DEFAULT_MARGIN).encode()
        for table in build_tables(collection.results, spec.table_names())
        for fmt, suffix in SUFFIX.items()
    }


def record_folder(entry: ManifestEntry) -> str:
    """Return the folder of a run in a bundle, below `records/` and `weights/`."""
    return f"{entry.stage}/{entry.name}-{entry.run_id}"


def format_checksums(checksums: Mapping[str, str]) -> bytes:
    """Return the SHA-256 of each file in the form of `sha256sum`."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items())).encode()


def build_crate(
    reproduction: str,
    sizes: Mapping[str, int],
    checksums: Mapping[str, str],
    entries: Sequence[ManifestEntry],
) -> bytes:
    """Return the metadata of a bundle as RO-Crate 1.1 asks for them.

    https://www.researchobject.org/ro-crate/specification/1.1/. Written here, since the library
    `rocrate` dates it with the time of writing, names parts by chance, and compresses.
    """
    files: list[dict[str, Any]] = [
        {
            "@id": name,
            "@type": "File",
            "contentSize": str(sizes[name]),
            "encodingFormat": _find_media_type(name),
            "sha256": checksums[name],
        }
        for name in sorted(checksums)
    ]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"Reproduction {reproduction}",
        "description": "Results, records and tables of a reproduction made with mugs-repro.",
        "datePublished": max((entry.finished for entry in entries), default=""),
        "license": "Whoever made this bundle has not stated one in it.",
        "hasPart": [{"@id": file["@id"]} for file in files],
    }
    descriptor = {
        "@id": CRATE,
        "@type": "CreativeWork",
        "about": {"@id": "./"},
        "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
    }
    context = "https://w3id.org/ro/crate/1.1/context"
    return format_json({"@context": context, "@graph": [descriptor, root, *files]})


def _find_media_type(name: str) -> str:
    types = {
        "csv": "text/csv",
        "html": "text/html",
        "json": "application/json",
        "jsonl": "application/jsonl",
        "md": "text/markdown",
        "tex": "application/x-tex",
        "yaml": "application/yaml",
    }
    return types.get(name.rpartition(".")[2], "application/octet-stream")
