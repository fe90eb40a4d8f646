"""The commands `import` and `export`: weights to our format, and from it to timm."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import manifest
from pipeline.files import check_overwrite, expand_home, make_folder, write_atomic
from pipeline.manifest import ManifestEntry
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from results.card import render_card
from results.runs import FinishedRun
from stages.commands.finished_results import collect_finished
from stages.import_weights import load_foreign_weights, write_imported_weights
from stages.shared.imported_weights import ImportConfig

if TYPE_CHECKING:
    from mugs.models.vit import ViT

Format = Literal["timm", "safetensors"]

# By the suffix of a file.
FORMATS: dict[str, Format] = {".safetensors": "safetensors", ".pth": "timm", ".pt": "timm"}

# How the description of each backbone file begins, and the list of keys that do not fit.
BACKBONE_MARK = '{"__metadata__":{"mugs":'
CARD_FILE = "README.md"
KEYS_MARK = "# Keys that do not fit, listed by the command import"


def import_settings(file: str, arch: str, **options: Any) -> ImportConfig:
    """Return the configuration of the stage `import` for one file.

    Raises:
        ConfigError: an option has no such value.
    """
    # The stage needs the number of epochs for result rows, which a single file does not get.
    return validate_model(
        ImportConfig, {"file": file, "arch": arch, "epochs": 0, **options}, "import"
    )


def import_file(cfg: ImportConfig, out: Path, *, force: bool = False) -> list[str]:
    """Write the backbone in `cfg.file` to `out`; return the lines to print.

    Raises:
        ConfigError: `out` has another suffix, or the file does not fit; the message names the keys.
        OverwriteError: there is a file that is none of ours, and `force` is not given.
    """
    from mugs.weights.pickle_file import WeightsError

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    check_overwrite(out, BACKBONE_MARK, force=force)
    try:
        found = load_foreign_weights(cfg)
    except WeightsError as error:
        if not error.details:
            raise ConfigError(shorten_error(error)) from error
        listed = out.with_suffix(".keys.txt")
        check_overwrite(listed, KEYS_MARK, force=force)
        write_atomic(listed, f"{KEYS_MARK}\n{error.details}\n")
        raise ConfigError(f"{shorten_error(error)}; all of them are in {listed}") from error
    write_imported_weights(found, out)
    tensors = f"{len(found.vit.state_dict())} tensors of {cfg.arch}"
    return [
        f"{out}: {tensors}, SHA-256 of the file {found.sha256}",
        *(f"  left out: {key}" for key in found.discarded),
    ]


def export_backbone(
    run: str,
    out: Path,
    run_root: Path,
    *,
    weights: str = "teacher",
    format: Format | None = None,
    force: bool = False,
) -> list[str]:
    """Write the backbone of a run, or of a weights file, for timm; return the lines to print.

    Without a `format`, the suffix of `out` tells it.

    Raises:
        ConfigError: there is no such run or network, the file is damaged, or the suffix of `out` is
            that of another format.
        OverwriteError: there is a file that is no export of ours, and `force` is not given.
    """
    from mugs.weights.timm_export import MARK, format_timm_call, write_bare_weights

    format = choose_format(out, format)
    check_overwrite(expand_home(out), MARK, force=force)
    vit = _load_for_timm(find_backbone_file(run, run_root, weights))
    # Loaded first: a file that cannot be read must not replace an older export.
    write_bare_weights(expand_home(out), vit, format)
    loader = "torch.load" if format == "timm" else "safetensors.torch.load_file"
    return [
        f"{out}: {len(vit.state_dict())} tensors, loaded into timm and compared",
        f"model = {format_timm_call(vit.config)}",
        f"model.load_state_dict({loader}({str(out)!r}))",
        "Normalize images with the mean and standard deviation of ImageNet.",
    ]


def choose_format(out: Path, format: Format | None) -> Format:
    """Return the format of an export: the given one, else that of the suffix, else timm's.

    Raises:
        ConfigError: they contradict each other, so the file could not be loaded by its name.
    """
    suffix = out.suffix.lower()
    known = FORMATS.get(suffix, format or "timm")
    if format is not None and format != known:
        raise ConfigError(
            f"--out {out}: {suffix} is not the suffix of --format {format}; omit --format, or"
            " choose another name"
        )
    return known


def export_to_hub(
    run: str,
    out: Path,
    run_root: Path,
    *,
    weights: str = "teacher",
    co2: float | None = None,
    force: bool = False,
) -> list[str]:
    """Write the folder of a backbone for the Hugging Face Hub; return the lines to print.

    The card has the results of all finished runs of the run root that evaluated it. `co2` are the
    grams of CO2 for each kWh.

    Raises:
        ConfigError: there is no such run or network, or the file is damaged.
        OverwriteError: a file there is no export of ours, and `force` is not given.
    """
    from mugs.weights.hub_export import (
        CONFIG_FILE,
        USUAL_SIZES,
        WEIGHTS_FILE,
        write_hub_files,
    )
    from mugs.weights.timm_export import MARK

    folder = expand_home(out).absolute()
    for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
        check_overwrite(folder / name, MARK, force=force)
    if expand_home(run).is_file():
        raise ConfigError(
            f"{run}: is a file, of which no settings and results are known; for --format hub name"
            " a run"
        )
    entry = find_run_with_weights(run, run_root, weights)
    collection = collect_finished(entry.run_root)
    if entry.run_id not in collection.runs:
        raise ConfigError(f"{entry.run_dir}: its record cannot be read; see the command tables")
    vit = _load_for_timm(entry.output(weights))
    sizes = find_evaluated_sizes(entry.run_id, weights, collection.runs.values()) or USUAL_SIZES
    run_of_card = collection.runs[entry.run_id]
    card = render_card(run_of_card, weights, collection, mark=MARK, sizes=sizes, co2=co2)
    make_folder(folder)
    files = [*write_hub_files(folder, vit, sizes), write_atomic(folder / CARD_FILE, card)]
    return [
        *(f"{file}: {file.stat().st_size:,} bytes" for file in files),
        f'model = timm.create_model("local-dir:{folder}", pretrained=True)',
        "Read README.md and add a license, then upload the folder: hf upload USER/NAME FOLDER",
    ]


def find_evaluated_sizes(
    run_id: str, weights: str, runs: Iterable[FinishedRun]
) -> tuple[int, int] | None:
    """Return to what a network's evaluations resized images, and the side of the middle they took.

    None if there are none, or if they did not all do the same.
    """
    found = {
        (int(run.config["resize"]), int(run.config["crop"]))
        for run in runs
        if run_id in run.upstream.values()
        and str(run.config.get("weights", "teacher")) == weights
        and {"resize", "crop"} <= run.config.keys()
    }
    return found.pop() if len(found) == 1 else None


def _load_for_timm(path: Path) -> "ViT":
    """Return a backbone after timm computed the same features with it.

    Raises:
        ConfigError: the file is damaged, or timm does not.
    """
    from mugs.weights.pickle_file import WeightsError
    from mugs.weights.timm_export import load_vit_for_timm

    try:
        return load_vit_for_timm(path)
    except WeightsError as error:
        raise ConfigError(shorten_error(error)) from error


def find_backbone_file(run: str, run_root: Path, weights: str) -> Path:
    """Return `run` if it is a file, else the file with the `weights` of that finished run.

    Raises:
        ConfigError: there is no such run, it has no such weights, or they are damaged.
    """
    path = expand_home(run).absolute()
    if path.is_file():
        if weights != "teacher":
            raise ConfigError(
                f"--weights {weights}: the file {path} has only one network; omit the option,"
                " or name a run"
            )
        return path
    return find_run_with_weights(run, run_root, weights).output(weights)


def find_run_with_weights(run: str, run_root: Path, weights: str) -> ManifestEntry:
    """Return a finished run, whose `weights` are what it wrote.

    Raises:
        ConfigError: there is no such run, it has no such weights, or they are damaged.
    """
    path = expand_home(run).absolute()
    # The folder of a run is <run_root>/<stage>/<name>-<id>, in whatever run root it lies.
    place = (path.name, path.parents[1]) if path.is_dir() else (run, run_root)
    entry = find_finished_run(*place)
    if weights not in entry.outputs:
        known = ", ".join(sorted(entry.outputs)) or "nothing"
        raise ConfigError(
            f"run {entry.name}-{entry.run_id} has no weights {weights!r} (it has: {known}; those "
            f"with such weights: {_list_runs_with(weights, entry.run_root)})"
        )
    # By hash and not only by size: the file leaves the run root, and its record with it.
    try:
        manifest.check_intact(entry, weights)
    except manifest.DamagedError as error:
        raise ConfigError(shorten_error(error)) from error
    return entry


def find_finished_run(run: str, run_root: Path) -> ManifestEntry:
    """Return the finished run with this folder name, id or name.

    Raises:
        ConfigError: no finished run is called so, or several are.
    """
    entries = manifest.list_done(run_root)
    named = [entry for entry in entries if run in (entry.run_dir.name, entry.run_id, entry.name)]
    if len(named) == 1:
        return named[0]
    if named:
        folders = ", ".join(entry.run_dir.name for entry in named)
        raise ConfigError(f"{run}: several runs have this name: {folders}")
    known = [entry.run_dir.name for entry in entries if entry.stage in ("pretrain", "import")]
    raise ConfigError(
        f"{run}: neither a file nor a finished run in {run_root}"
        f" (those with weights: {', '.join(known) or 'none'})"
    )


def _list_runs_with(weights: str, run_root: Path) -> str:
    """Return the folder names of the finished runs that have such weights, or "none"."""
    entries = manifest.list_done(run_root)
    names = [entry.run_dir.name for entry in entries if weights in entry.outputs]
    return ", ".join(names) or "none"


def shorten_error(error: Exception) -> str:
    """Return an error in one line, with only the first of many tensors of a wrong shape."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + more
