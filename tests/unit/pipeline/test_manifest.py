"""The manifest: what counts as done, what does not, and who may publish."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import attempts, manifest
from pipeline.files import collect_unreadable
from pipeline.spec import Resources, StageConfig, StageRun

RUN = StageRun("knn", "mine", "0123456789ab", StageConfig(), {}, Resources(), "x:run")


def publish(root: Path) -> manifest.ManifestEntry:
    run_dir = RUN.run_dir(root)
    attempt = attempts.start_attempt(run_dir)
    (run_dir / "weights").mkdir(exist_ok=True)
    (run_dir / "weights" / "a.bin").write_bytes(b"abc")
    (run_dir / "note.txt").write_text("hello")
    (run_dir / "rows.csv").write_text("x\n")
    labels = {"weights": run_dir / "weights", "note": run_dir / "note.txt"}
    entry = manifest.ManifestEntry(
        stage=RUN.stage,
        name=RUN.name,
        run_id=RUN.run_id,
        outputs={label: manifest.describe_output(root, path) for label, path in labels.items()},
        rows=f"knn/{RUN.key}/rows.csv",
        attempt=attempt,
    )
    manifest.record_entry(root, entry)
    return entry


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The entry of a run that is done."""
    publish(tmp_path)
    return manifest.entry_path(tmp_path, RUN.run_id)


def test_round_trip(tmp_path: Path) -> None:
    assert manifest.split_runs(tmp_path, [RUN]).pending == [RUN]
    publish(tmp_path)
    entry = manifest.split_runs(tmp_path, [RUN]).done[RUN.run_id]
    assert entry.output("note") == RUN.run_dir(tmp_path) / "note.txt"
    assert entry.outputs["weights"].size == 3
    assert entry.rows_path is not None and entry.rows_path.is_file()
    assert manifest.find_problems(entry, hashes=True) == []
    with pytest.raises(KeyError, match=r"no output 'nose'.*note, weights"):
        entry.output("nose")


def test_run_root_may_move(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert manifest.find_done(tmp_path / "b", RUN.run_id).output("note").read_text() == "hello"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"stage": "knn"}', "\x00\x01", '{"run_id": 3}']
)
def test_broken_entry_is_not_done(
    tmp_path: Path, published: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    published.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert manifest.find_done(tmp_path, RUN.run_id) is None
    assert str(published) in caplog.text


def test_entry_cut_at_any_byte_is_not_done(tmp_path: Path, published: Path) -> None:
    whole = published.read_bytes()
    for end in range(0, len(whole.rstrip()), 7):
        published.write_bytes(whole[:end])
        assert manifest.find_done(tmp_path, RUN.run_id) is None, end


def test_foreign_entry_is_not_done(
    tmp_path: Path, published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published.rename(published.with_name("ffffffffffff.json"))
    assert manifest.find_done(tmp_path, "ffffffffffff") is None
    assert "entry is of run 0123456789ab" in caplog.text


@pytest.mark.parametrize("name", ["a b.json", "-x.json", "a\n.json", "$(x).json", "a\udce9.json"])
def test_an_entry_with_a_name_that_is_no_run_id_is_left_out(
    tmp_path: Path, published: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It stopped every command that goes through all entries."""
    foreign = published.with_name(name)
    foreign.write_bytes(published.read_bytes())
    with collect_unreadable() as unreadable:
        assert manifest.list_run_ids(tmp_path) == [RUN.run_id]
    assert unreadable == [foreign] and "not the name of a manifest entry" in caplog.text


def test_missing_short_and_altered_outputs(tmp_path: Path) -> None:
    publish(tmp_path)
    note = RUN.run_dir(tmp_path) / "note.txt"
    note.write_text("hellO")
    entry = manifest.find_done(tmp_path, RUN.run_id)
    assert entry is not None, "the same size: only verify can tell"
    assert "differs from the SHA-256" in manifest.find_problems(entry, hashes=True)[0]
    note.write_text("hell")
    assert manifest.find_done(tmp_path, RUN.run_id) is None
    note.unlink()
    assert manifest.find_done(tmp_path, RUN.run_id) is None


def test_older_attempt_may_not_publish(tmp_path: Path) -> None:
    entry = publish(tmp_path)
    path = manifest.entry_path(tmp_path, RUN.run_id)
    before = path.read_bytes()
    attempts.start_attempt(RUN.run_dir(tmp_path))
    with pytest.raises(attempts.StaleAttemptError, match="attempt 1 is not the newest"):
        manifest.record_entry(tmp_path, entry)
    assert path.read_bytes() == before


def test_output_outside_the_run_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="outside the run root"):
        manifest.describe_output(tmp_path / "root", tmp_path / "x")


def test_attempt_numbers_are_never_shared(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = pool.map(lambda _: attempts.start_attempt(tmp_path), range(80))
    assert sorted(taken) == list(range(1, 81))


def test_ranks_find_the_attempt_of_their_launch(tmp_path: Path) -> None:
    numbers = [attempts.start_attempt(tmp_path, launch=launch) for launch in "ab"]
    assert [attempts.find_attempt(tmp_path, launch) for launch in "ab"] == numbers
    assert [attempts.is_newest_attempt(tmp_path, number) for number in numbers] == [False, True]
    with pytest.raises(TimeoutError):
        attempts.find_attempt(tmp_path, "c", timeout_s=0)


def test_first_failure_is_kept(tmp_path: Path) -> None:
    number = attempts.start_attempt(tmp_path)
    assert attempts.read_failure(tmp_path) is None
    attempts.record_failure(tmp_path, number, error="cause", log=tmp_path / "log")
    attempts.record_failure(tmp_path, number, error="consequence", log=tmp_path / "log")
    found = attempts.read_failure(tmp_path)
    assert (found.error, found.attempt) == ("cause", 1)
    assert attempts.latest_attempt(tmp_path) == 1
