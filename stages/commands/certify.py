"""`verify BUNDLE --certificate`: which level a check has reached, and by what.

No level is given because a file says so: 1 and 2 are what this very command did, 3 and 4 compare
the bundle with runs of our own, in a run root of our own. docs/evidence.md describes the levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pipeline import manifest, provenance
from pipeline.files import (
    check_overwrite,
    expand_home,
    hash_file,
    hash_json,
    read_json,
    write_atomic,
)
from pipeline.manifest import ManifestEntry
from pipeline.ownership import find_foreign_owner
from pipeline.spec import ConfigError
from results.certificate import MARK, Certificate, Level
from results.collect import CollectedResults
from results.runs import FinishedRun
from results.verdict import DEFAULT_MARGIN, Comparison
from results.vocabulary import load_vocabulary
from stages.commands.bundle_content import read_science
from stages.commands.finished_results import collect_finished
from stages.commands.repeat_knn import RepeatedRun
from stages.commands.run_chain import is_copy
from stages.commands.verify_bundle import BundleCheck

# As many as a reader takes in; `verify` prints all of them.
_MOST_PROBLEMS = 5
# Values of seeds, by data set and setting of a k-NN evaluation.
Numbers = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Repetition:
    """A pretraining of the bundle, and ours with the same settings (the seed may be another)."""

    bundled: Sequence[ManifestEntry]
    ours: Sequence[ManifestEntry]

    @property
    def name(self) -> str:
        """Name of the pretraining."""
        return self.bundled[0].name

    def find_equal(self) -> Iterator[str]:
        """Yield a line for each backbone of ours that equals the bundled one, bit by bit."""
        teachers = {entry.run_id: entry.outputs.get("teacher") for entry in self.bundled}
        for entry in self.ours:
            there = teachers.get(entry.run_id)
            here = entry.outputs.get("teacher")
            if there is not None and here is not None and there.sha256 == here.sha256:
                yield f"{entry.name}-{entry.run_id}: the teacher's SHA-256 is {here.sha256} in both"


def certify(
    found: BundleCheck, repeated: Sequence[RepeatedRun], against: Path | None
) -> Certificate:
    """Return which levels were reached.

    Raises:
        ConfigError: there is no folder `against`.
    """
    knn = tuple(each.describe() for each in repeated) or (_why_not_repeated(found),)
    levels = [
        Level(1, found.intact, (found.summary(), *found.problems[:_MOST_PROBLEMS])),
        Level(2, bool(repeated) and all(each.repeated for each in repeated), knn),
    ]
    if not found.intact or against is None:
        reason = "no run root with a pretraining of our own was given (--against)"
        levels += [Level(number, False, (reason,)) for number in (3, 4)]
    else:
        levels += _compare_pretrainings(found, expand_home(against).absolute())
    root = provenance.code_root()
    code = {**provenance.read_git_state(root), "versions": provenance.collect_versions()}
    name = found.about.reproduction if found.about else ""
    return Certificate(name, hash_file(found.path), tuple(levels), code)


def _why_not_repeated(found: BundleCheck) -> str:
    if not found.intact:
        return "the bundle is not intact"
    if not found.weights:
        return "k-NN was not repeated: it has no backbones (bundle --weights)"
    return "k-NN was not repeated (--data)"


def write_certificate(
    certificate: Certificate, bundle: Path, out: Path | None, *, force: bool
) -> list[str]:
    """Write the certificate and its badge into a folder (default: that of the bundle).

    A better one of the same bundle stays unless `force` is given: options that were left out are no
    news about the bundle. Returns what to print: the files, or that they stay.

    Raises:
        OverwriteError: a file there is none of ours, and `force` is not given.
    """
    folder = bundle.parent if out is None else expand_home(out)
    facts = folder / f"{bundle.stem}.certificate.json"
    texts = {
        facts: certificate.format_json(),
        folder / f"{bundle.stem}.certificate.svg": certificate.render_badge(),
    }
    for path in texts:
        check_overwrite(path, MARK, force=force)
    before = read_json(facts, {"bundle_sha256": str, "level": int}) or {}
    same = before.get("bundle_sha256") == certificate.bundle_sha256
    reached = before.get("level") or 0
    if same and not force and reached > certificate.level > 0:
        return [f"{facts} stays: level {reached} was reached before (--force replaces it)"]
    return [str(write_atomic(path, text)) for path, text in texts.items()]


def _compare_pretrainings(found: BundleCheck, root: Path) -> list[Level]:
    if not root.is_dir():
        raise ConfigError(f"--against {root}: there is no such folder")
    repetitions, refused = _find_repetitions(found, root)
    if not repetitions:
        nothing = refused or [f"{root} has no finished pretraining with the settings of one here"]
        return [Level(number, False, tuple(nothing)) for number in (3, 4)]
    ours = collect_finished(root)
    outcomes = [outcome for each in repetitions for outcome in _decide(each, found, ours)]
    words = [line for _, line in outcomes]
    decided = {outcome for outcome, _ in outcomes}
    # One that is lower is not made good by another one.
    reproduced = "reproduced" in decided and decided <= {"reproduced", "undecided"}
    equal = [line for each in repetitions for line in each.find_equal()]
    return [
        Level(3, reproduced, (*words, *refused) or ("our pretraining has no k-NN yet",)),
        Level(4, bool(equal), tuple(equal) or ("no backbone is equal bit by bit",)),
    ]


def _find_repetitions(found: BundleCheck, root: Path) -> tuple[list[Repetition], list[str]]:
    """Return the pretrainings that we repeated, and why others do not count."""
    refused: list[str] = []
    mine = []
    for entry in manifest.list_done(root):
        if entry.stage == "pretrain":
            try:
                mine.append((entry, _describe_experiment(entry)))
            except ConfigError as error:
                refused.append(str(error))
    theirs = [entry for entry in found.entries.values() if entry.stage == "pretrain"]
    repetitions = []
    groups: dict[str, list[ManifestEntry]] = {}
    for entry in theirs:
        groups.setdefault(_describe_experiment(entry), []).append(entry)
    for experiment, group in groups.items():
        same = [entry for entry, described in mine if described == experiment]
        reasons = {entry.run_id: _why_not_ours(entry, found) for entry in same}
        refused += [reason for reason in reasons.values() if reason]
        ours = [entry for entry in same if not reasons[entry.run_id]]
        if ours:
            repetitions.append(Repetition(group, ours))
    return repetitions, refused


def _describe_experiment(entry: ManifestEntry) -> str:
    """Return what two pretrainings have in common that differ in their seed only.

    Raises:
        ConfigError: its record has settings that a pretraining has not.
    """
    settings = {key: value for key, value in read_science(entry).items() if key != "seed"}
    return hash_json({"settings": settings, "upstream": dict(entry.upstream)})


def _why_not_ours(entry: ManifestEntry, found: BundleCheck) -> str:
    """Return why a pretraining is no repetition of ours; "" if it is one."""
    where = f"{entry.name}-{entry.run_id}"
    if owner := find_foreign_owner(entry.run_dir):
        return f"{where}: belongs to {owner}"
    there = found.entries.get(entry.run_id)
    if there is not None and is_copy(entry, there):
        return f"{where}: is the bundled run itself, or a copy of it"
    problems = manifest.find_problems(entry, hashes=True)
    return problems[0] if problems else ""


def _decide(
    repetition: Repetition, found: BundleCheck, ours: CollectedResults
) -> Iterator[tuple[str, str]]:
    """Yield outcome and words for the k-NN accuracy on each data set.

    The setting is the one that is best in the bundle: ours is not selected.
    """
    assert found.results is not None
    there = _collect_knn(repetition.bundled, found.results)
    here = _collect_knn(repetition.ours, ours)
    images = load_vocabulary().evaluation_images
    for dataset in sorted({dataset for dataset, _ in there.keys() & here.keys()}):
        common = {key for key in there.keys() & here.keys() if key[0] == dataset}
        best = max(sorted(common), key=lambda key: fmean(there[key]))
        place = f"{repetition.name}, k-NN on {dataset}, {best[1]}"
        if dataset not in images:
            yield "undecided", f"{place}: no verdict: number of images of {dataset} unknown"
            continue
        comparison = Comparison(
            values=tuple(here[best]),
            paper=fmean(there[best]),
            images=images[dataset],
            margin=DEFAULT_MARGIN,
        )
        numbers = f"{comparison.mean:.3f} here, {comparison.paper:.3f} in the bundle"
        yield comparison.decide(), f"{place}: {numbers}: {comparison.describe()}"


def _collect_knn(entries: Sequence[ManifestEntry], results: CollectedResults) -> Numbers:
    """Return the k-NN accuracies of the teachers of pretrainings."""
    wanted = {entry.run_id for entry in entries}
    found: Numbers = {}
    for result in results.results:
        run = results.runs.get(result.row.run_id)
        if result.row.stage != "knn" or result.row.metric != "top1" or run is None:
            continue
        # Of stored features, the run that computed them took the backbone.
        source = results.runs.get(run.upstream.get("features", ""), run)
        if source.upstream.get("weights") in wanted and _weights_of(source) == "teacher":
            found.setdefault((result.row.dataset, result.row.setting), []).append(result.row.value)
    return found


def _weights_of(run: FinishedRun) -> str:
    config: Mapping[str, object] = run.config
    return str(config.get("weights", "teacher"))
