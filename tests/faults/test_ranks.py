"""What happens to rank 0's checkpoints happens to all ranks."""

import os
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from checkpoint_cases import POLICY, loaded_step, save
from shim import failing, intercepted

from mugs import distributed
from mugs.checkpoint.record import CheckpointError
from mugs.checkpoint.save_load import StateDicts, load_checkpoint, load_latest
from mugs.checkpoint.saver import CheckpointSaver
from mugs.engine.control import NullControl

ERROR = (CheckpointError, distributed.MainRankError)


class Counted:
    """Nothing to save."""

    total_steps = 9

    def state_dicts(self) -> dict[str, object]:
        return {"x": {}}

    def metadata(self) -> dict[str, object]:
        return {}


def on_two_ranks(work: Callable[[], None]) -> None:
    """Do some work on two ranks; both must end well."""
    port = processes.free_port()

    def rank(number: int) -> None:
        os.environ.update(
            RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        distributed.init_process_group(timeout_minutes=1)
        work()
        distributed.destroy_process_group()

    ranks = [processes.start(lambda number=number: rank(number)) for number in (0, 1)]
    assert [processes.end(process) for process in ranks] == [0, 0]


def test_texts_and_errors_of_rank_0_reach_rank_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pickles: the ranks meet without a password, and to read a pickle is to run it."""
    monkeypatch.setattr("torch.distributed.distributed_c10d._unpickler", None, raising=False)

    def work() -> None:
        main = distributed.is_main()
        for text in ("", "step 3", "größer" * 1000, "not UTF-8: \udcff"):
            assert distributed.broadcast_from_main(text if main else "?") == text
        assert distributed.run_on_main(lambda: 7) == "7"
        with pytest.raises(KeyError if main else distributed.MainRankError, match=r"no such thing"):
            distributed.run_on_main(lambda: {}["no such thing"])
        assert distributed.run_on_main(lambda: "go on") == "go on"

    on_two_ranks(work)


@pytest.mark.parametrize("at_the_end", [True, False])
def test_an_error_of_the_writer_surfaces_on_both(tmp_path: Path, at_the_end: bool) -> None:
    def work() -> None:
        saver = CheckpointSaver(Counted(), tmp_path / "checkpoints", POLICY, NullControl())
        with intercepted(failing(6, 28)):
            saver.save(1)
            with pytest.raises(ERROR, match="No space left on device"):
                saver.finish() if at_the_end else saver.save(2)
        saver.save(3)
        saver.finish()
        saver.close()

    on_two_ranks(work)
    assert load_latest(tmp_path / "checkpoints")[0] == 3


def test_no_room_stops_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        assert distributed.is_main()
        raise CheckpointError("1 MB free")

    monkeypatch.setattr("mugs.checkpoint.saver.check_free_space_for_run", full)

    def work() -> None:
        with pytest.raises(ERROR, match="1 MB free"):
            CheckpointSaver(Counted(), tmp_path, POLICY, NullControl())

    on_two_ranks(work)


def test_both_resume_where_rank_0_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mugs.engine import loop

    for step in (1, 2):
        save(tmp_path, step)
    load, loaded = loop.load_latest, []

    def blind(folder: Path) -> object:
        assert distributed.is_main()
        (tmp_path / "step_00000002").rename(tmp_path / "hidden")
        found = load(folder)
        (tmp_path / "hidden").rename(tmp_path / "step_00000002")
        return found

    class Task(Counted):
        def load_state(self, parts: StateDicts, notes: dict[str, object]) -> None:
            loaded.append((parts, notes["history"][0]))

    monkeypatch.setattr(loop, "load_latest", blind)
    _, expected, _ = load_checkpoint(tmp_path / "step_00000001")

    def work() -> None:
        assert loop.resume_training(Task(), tmp_path, POLICY) == 1
        ((parts, step),) = loaded
        assert step == 1
        # Rank 1 has read nothing (see `blind`).
        assert [list(part) for part in parts.values()] == [list(x) for x in expected.values()]
        for part, tensors in expected.items():
            for name, value in tensors.items():
                assert torch.equal(parts[part][name], value)
                assert parts[part][name].dtype == value.dtype

    on_two_ranks(work)
    assert loaded_step(tmp_path) == 2
