"""Repeat the k-NN of a bundle: the same runs, on its backbones, in a folder of our own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.archive import open_archive
from pipeline.files import expand_home, make_folder, write_new_file
from pipeline.manifest import ManifestEntry
from pipeline.run_root import mark_run_root
from pipeline.settings import setting_fields
from pipeline.spec import ConfigError, StageRun
from pipeline.text import format_count
from results.store import read_results
from stages import STAGES
from stages.commands import bundle_content as content
from stages.commands.verify_bundle import BundleCheck
from stages.shared.image_data import BUILTIN, PUBLIC, ConvertConfig

# Points. Other devices and libraries round otherwise, so single images may change their nearest
# neighbors. On one machine all is equal.
TOLERANCE = 0.1


@dataclass(frozen=True)
class RepeatedRun:
    """A k-NN evaluation that was repeated: its numbers here and in the bundle, by setting."""

    name: str
    run_id: str
    here: dict[str, float]
    there: dict[str, float]

    @property
    def difference(self) -> float:
        """The largest difference of a number, infinity if one is missing on a side."""
        if self.here.keys() != self.there.keys() or not self.here:
            return float("inf")
        return max(abs(self.here[key] - self.there[key]) for key in self.here)

    @property
    def repeated(self) -> bool:
        """Whether all numbers are equal, within what another device may change."""
        return self.difference <= TOLERANCE

    def describe(self) -> str:
        """Return a line about it."""
        if not self.here:
            return f"{self.name}-{self.run_id}: not repeated, as a run failed (see above)"
        count = (
            f"{self.name}-{self.run_id}: {format_count(len(self.here), 'number')} of k-NN repeated"
        )
        if self.difference == 0:
            return f"{count}, all equal"
        if self.repeated:
            return f"{count}, equal within {self.difference:.3g} points"
        pairs = [
            f"{key}: {self.here.get(key, 'missing')} here, {self.there.get(key, 'missing')} there"
            for key in sorted(self.here.keys() | self.there.keys())
            if self.here.get(key) != self.there.get(key)
        ]
        return f"{count}, which differ: {'; '.join(pairs)}"


def list_runs_to_repeat(found: BundleCheck, data: str) -> list[StageRun]:
    """Return the k-NN runs that can be repeated, and what they need but the backbones.

    Of the bundle only settings that can change a result are used; threads, memory and the like are
    our defaults, as somebody else may have chosen them to do harm.

    Raises:
        ConfigError: the bundle has no k-NN with its backbone, or the folder has no images.
    """
    planned = {run.run_id: run for run in found.runs}
    wanted: dict[str, StageRun] = {}
    chosen = ""
    for run in found.runs:
        chain = _find_chain(run, planned)
        if run.stage != "knn" or run.run_id not in found.entries or chain is None:
            continue
        data_run, source, backbone = chain
        label = str(getattr(source.config, "weights", "teacher"))
        folder = content.record_folder(found.entries[backbone])
        # One folder has the images of one data set.
        chosen = chosen or data_run.run_id
        if f"weights/{folder}/{label}.safetensors" in found.sha256 and data_run.run_id == chosen:
            wanted |= {each.run_id: each for each in (data_run, source, run)}
    if not wanted:
        raise ConfigError(
            f"{found.path}: has no k-NN together with its backbone; make it with bundle --weights"
        )
    return [_with_our_runtime(run, data) for run in found.runs if run.run_id in wanted]


def _find_chain(
    run: StageRun, planned: dict[str, StageRun]
) -> tuple[StageRun, StageRun, str] | None:
    """Return the data of an evaluation, the run that computes its features, and its backbone."""
    features = planned.get(run.needs.get("features", ""))
    source = features or run
    data = planned.get(source.needs.get("data", ""))
    backbone = source.needs.get("weights")
    if data is None or backbone is None or not isinstance(data.config, ConvertConfig):
        return None
    return data, source, backbone


def _with_our_runtime(run: StageRun, data: str) -> StageRun:
    config: Any = run.config
    ours = {
        field.name: field.default
        for field in setting_fields(type(config)).values()
        if field.runtime
    }
    if isinstance(config, ConvertConfig):
        ours |= find_image_folders(config, data)
    return replace(run, config=replace(config, **ours), resources=STAGES[run.stage].resources)


def find_image_folders(config: ConvertConfig, data: str) -> dict[str, str]:
    """Return the settings that say where the images are.

    Raises:
        ConfigError: the folder has not what the data set needs.
    """
    if data in BUILTIN:
        return {"train_dir": data, "val_dir": data}
    folder = expand_home(data).absolute()
    if all((folder / split).is_dir() for split in config.splits):
        return {f"{split}_dir": str(folder / split) for split in config.splits}
    if config.dataset in PUBLIC and folder.is_dir():
        return {"root": str(folder)}
    expected = " and ".join(f"{folder / split}" for split in config.splits)
    raise ConfigError(f"--data {data}: expected the folders {expected}, with a folder per class")


def restore_backbones(found: BundleCheck, runs: Sequence[StageRun], root: Path) -> None:
    """Put the backbones that runs need into a run root, as if they had been trained there."""
    make_folder(root)
    mark_run_root(root)
    given = {run.run_id for run in runs}
    needed = {need for run in runs for need in run.needs.values()} - given
    with open_archive(found.path) as archive:
        for run_id in sorted(needed):
            entry = found.entries[run_id]
            folder = content.record_folder(entry)
            outputs = {}
            for label, output in entry.outputs.items():
                name = f"weights/{folder}/{label}.safetensors"
                if name in archive.members:
                    path = f"{folder}/{label}.safetensors"
                    make_folder((root / path).parent)
                    write_new_file(root / path, archive.iter_chunks(name))
                    outputs[label] = output.model_copy(update={"path": path})
            restored = {"outputs": outputs, "rows": None, "rows_sha256": None, "attempt": 1}
            manifest.record_entry(root, entry.model_copy(update=restored))


def compare_with_bundle(
    found: BundleCheck, runs: Sequence[StageRun], root: Path
) -> Iterator[RepeatedRun]:
    """Yield each k-NN run with its numbers here and in the bundle."""
    assert found.results is not None
    for run in runs:
        if run.stage != "knn":
            continue
        entry = manifest.find_done(root, run.run_id)
        there = {
            f"{result.row.setting}, {result.row.metric}": result.row.value
            for result in found.results.results
            if result.row.run_id == run.run_id
        }
        yield RepeatedRun(run.name, run.run_id, _read_numbers(entry), there)


def _read_numbers(entry: ManifestEntry | None) -> dict[str, float]:
    if entry is None or entry.rows_path is None:
        return {}
    results, _ = read_results(entry.rows_path)
    return {f"{each.row.setting}, {each.row.metric}": each.row.value for each in results}
