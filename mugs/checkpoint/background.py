"""Checkpoints are written by a thread while training goes on."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from mugs.checkpoint.host_copy import HostCopy
from mugs.checkpoint.save_load import SavePolicy, StateDicts, save_checkpoint, state_bytes
from mugs.checkpoint.space import format_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveReport:
    """How long a save took: `stall_s` training stood still, after `durable_s` it was on disk.

    Both count from the start of the save.
    """

    step: int
    bytes: int
    stall_s: float
    durable_s: float

    def fields(self) -> dict[str, Any]:
        """Return a line of metrics."""
        facts = asdict(self)
        return {"step": facts.pop("step"), "checkpoint": facts}


class BackgroundWriter:
    """Writes one checkpoint at a time, from a copy, in a thread.

    The next `save` or `wait` raises an error of the thread. The interpreter does not exit before
    the thread has finished.
    """

    def __init__(self, folder: Path, policy: SavePolicy) -> None:
        self.folder = folder
        self.policy = policy
        self.copy = HostCopy()
        self.stop = Event()
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.running: Future[SaveReport] | None = None

    def save(self, step: int, parts: StateDicts, meta: Mapping[str, Any]) -> SaveReport | None:
        """Copy the state and start to write it. Returns the report of the previous write.

        Waits for the previous write first.

        Raises:
            CheckpointError: the previous write failed.
        """
        began = time.monotonic()
        # Before the copy: the running write still reads these buffers.
        before = self.wait()
        copied = self.copy.copy_from(parts)
        stall = time.monotonic() - began
        self.running = self.pool.submit(self._write, step, copied, meta, began, stall)
        return before

    def wait(self) -> SaveReport | None:
        """Wait until the current write, if any, is on disk; raise its error."""
        running = self.running
        self.running = None
        return None if running is None else running.result()

    def close(self) -> None:
        """Wait for the current write without retries; only log its error."""
        self.stop.set()
        try:
            self.wait()
        # When training failed, its own error is the one to see.
        except Exception as error:
            logger.error("%s", error)
        finally:
            self.pool.shutdown()

    def _write(
        self, step: int, parts: StateDicts, meta: Mapping[str, Any], began: float, stall: float
    ) -> SaveReport:
        # The time of publication, not of the return: the read-back and the cleaning follow.
        durable = [began]
        save_checkpoint(
            self.folder,
            step,
            parts,
            meta,
            policy=self.policy,
            stop=self.stop,
            published=lambda: durable.append(time.monotonic()),
        )
        saved = SaveReport(step, state_bytes(parts), round(stall, 4), round(durable[-1] - began, 4))
        logger.info(
            "checkpoint of step %d, %s: training stood still for %.2f s, on disk after %.2f s",
            step,
            format_bytes(saved.bytes),
            saved.stall_s,
            saved.durable_s,
        )
        return saved
