"""Weights from elsewhere into a file of ours, and ours into files that timm loads."""

from pathlib import Path
from typing import Any, Literal

from pipeline import manifest
from pipeline.manifest import ManifestEntry
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from stages.import_weights import ImportConfig, load, save

Format = Literal["timm", "safetensors"]


def import_settings(file: str, arch: str, **options: Any) -> ImportConfig:
    """The stage's configuration for one file. Raises ConfigError."""
    return validate_model(
        ImportConfig, {"file": file, "arch": arch, "epochs": 0, **options}, "import"
    )


def import_file(cfg: ImportConfig, out: Path) -> list[str]:
    """Write the backbone that `cfg.file` holds; what to say. Raises ConfigError naming the keys that do not fit."""
    from mugs.weights.backbone_file import WeightsError

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    try:
        found = load(cfg)
    except WeightsError as error:
        raise ConfigError(shorten_error(error)) from error
    save(found, out)
    left_out = "".join(f"\n  left out: {key}" for key in found.discarded)
    return [
        f"{out}: {len(found.vit.state_dict())} tensors of {cfg.arch}, SHA-256 of the file {found.sha256}{left_out}"
    ]


def export_backbone(
    run: str, out: Path, run_root: Path, *, weights: str = "teacher", format: Format = "timm"
) -> list[str]:
    """Write the backbone of a run or of a file of ours for timm; what to say. Raises ConfigError."""
    from mugs.weights.backbone_file import WeightsError
    from mugs.weights.timm_export import format_timm_call, load_vit_for_timm, write_bare_weights

    try:
        vit = load_vit_for_timm(find_backbone_file(run, run_root, weights))
    except (WeightsError, manifest.DamagedError) as error:
        raise ConfigError(shorten_error(error)) from error
    write_bare_weights(out.expanduser(), vit, format)
    return [
        f"{out}: {len(vit.state_dict())} tensors, loaded into timm and compared",
        f"model = {format_timm_call(vit.config)}",
        f"model.load_state_dict({'torch.load' if format == 'timm' else 'safetensors.torch.load_file'}({str(out)!r}))",
        "Images: normalised with the mean and deviation of ImageNet.",
    ]


def find_backbone_file(run: str, run_root: Path, weights: str) -> Path:
    """A file as it is, else the weights of a finished run. Raises ConfigError, DamagedError."""
    path = Path(run).expanduser().absolute()
    if path.is_file():
        if weights != "teacher":
            raise ConfigError(
                f"--weights {weights}: the file {path} holds one network; name a run, or leave it out"
            )
        return path
    entry = (
        find_finished_run(path.name, path.parents[1])
        if path.is_dir()
        else find_finished_run(run, run_root)
    )
    if weights not in entry.outputs:
        known = ", ".join(sorted(entry.outputs)) or "nothing"
        raise ConfigError(
            f"run {entry.name}-{entry.run_id} has no weights {weights!r} (it has: {known})"
        )
    manifest.check_intact(entry, weights)
    return entry.output(weights)


def find_finished_run(run: str, run_root: Path) -> ManifestEntry:
    """The finished run of that folder name, id or name. Raises ConfigError unless it is exactly one."""
    entries = [
        entry
        for run_id in manifest.list_run_ids(run_root)
        if (entry := manifest.find_done(run_root, run_id))
    ]
    named = [entry for entry in entries if run in (entry.run_dir.name, entry.run_id, entry.name)]
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(
            f"{run}: several runs: {', '.join(entry.run_dir.name for entry in named)}"
        )
    known = (
        ", ".join(entry.run_dir.name for entry in entries if entry.stage in ("pretrain", "import"))
        or "none"
    )
    raise ConfigError(
        f"{run}: neither a file nor a finished run in {run_root} (those with weights: {known})"
    )


def shorten_error(error: Exception) -> str:
    """An error in one line: of many tensors of another shape the first, and how many more."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + more
