"""Where points go: one writer for each run, each with the package of its sink.

Everything is written to files below a folder; nothing is sent over the network, unless wandb is
told to (`WANDB_MODE=online`) or MLflow has the address of a server (`MLFLOW_TRACKING_URI`).
"""

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.sinks.reader import Point


class SinkError(Exception):
    """A sink cannot be written to; the message says what to do."""


@dataclass(frozen=True)
class SinkRun:
    """The run that points are from."""

    group: str
    """Name of the reproduction."""
    name: str
    run_id: str
    settings: Mapping[str, Any]
    """Settings by their dotted names."""

    @property
    def key(self) -> str:
        """Return a name that no other run has."""
        return f"{self.name}-{self.run_id}"


class Writer(ABC):
    """Writes the points of one run."""

    @abstractmethod
    def write(self, points: Sequence[Point]) -> None:
        """Write points and make sure that they are on disk."""

    @abstractmethod
    def close(self) -> None:
        """Release what the writer holds."""


class TensorBoardWriter(Writer):
    """Event files in `<folder>/<run>`, which `tensorboard --logdir <folder>` shows."""

    def __init__(self, folder: Path, run: SinkRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event = event_pb2.Event
        self.summary = summary_pb2.Summary
        self.file = EventFileWriter(str(folder / run.key))

    def write(self, points: Sequence[Point]) -> None:
        """Write an event for each point."""
        for point in points:
            values = [
                self.summary.Value(tag=name, simple_value=value)
                for name, value in point.values.items()
            ]
            # The lines have no times; that of an event is when it was read.
            event = self.event(
                step=point.step, wall_time=time.time(), summary=self.summary(value=values)
            )
            self.file.add_event(event)
        self.file.flush()

    def close(self) -> None:
        """Close the event file."""
        self.file.close()


class WandbWriter(Writer):
    """A run of Weights & Biases in `<folder>/wandb`; `wandb sync` uploads it."""

    def __init__(self, folder: Path, run: SinkRun) -> None:
        import wandb

        self.run = wandb.init(
            project=run.group,
            name=run.name,
            # The same id after a restart of the sink: one curve.
            id=run.run_id,
            resume="allow",
            dir=folder,
            config=dict(run.settings),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            # Neither the console nor the machine of the sink is the training's.
            settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
        )

    def write(self, points: Sequence[Point]) -> None:
        """Log each point at its step."""
        for point in points:
            self.run.log(dict(point.values), step=point.step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class MlflowWriter(Writer):
    """A run of MLflow, in a database in the folder unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, folder: Path, run: SinkRun) -> None:
        from mlflow import MlflowClient

        address = (
            os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db"
        )
        self.client = MlflowClient(tracking_uri=address)
        experiment = self.client.get_experiment_by_name(run.group)
        experiment_id = (
            experiment.experiment_id if experiment else self.client.create_experiment(run.group)
        )
        found = self.client.search_runs([experiment_id], f"tags.run_id = '{run.run_id}'")
        if found:
            self.id = found[0].info.run_id
            return
        made = self.client.create_run(experiment_id, run_name=run.name, tags={"run_id": run.run_id})
        self.id = made.info.run_id
        for name, value in run.settings.items():
            self.client.log_param(self.id, name, value)

    def write(self, points: Sequence[Point]) -> None:
        """Log all points."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        # A request has at most 1,000 values.
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics[first : first + 1000])

    def close(self) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id)


class TrackioWriter(Writer):
    """A run of trackio, in a database in the folder; TRACKIO_DIR of `trackio show` is that folder.

    Not through `trackio.init`, which starts a server for the time of a run.
    """

    def __init__(self, folder: Path, run: SinkRun) -> None:
        # It is read when trackio is imported.
        os.environ["TRACKIO_DIR"] = str(folder.absolute())
        from trackio.sqlite_storage import SQLiteStorage

        self.storage = SQLiteStorage
        self.run = run

    def write(self, points: Sequence[Point]) -> None:
        """Log all points. Each has an id, so that one that is sent twice is there once."""
        ids = [
            f"{self.run.run_id}-{point.step}-{hash_text(' '.join(sorted(point.values)))}"
            for point in points
        ]
        self.storage.bulk_log(
            self.run.group,
            self.run.name,
            [dict(point.values) for point in points],
            steps=[point.step for point in points],
            config=dict(self.run.settings),
            log_ids=ids,
            run_id=self.run.run_id,
        )

    def close(self) -> None:
        """Do nothing: every write is on disk."""


def hash_text(text: str) -> str:
    """Return a short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


WRITERS: dict[str, Callable[[Path, SinkRun], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "mlflow": MlflowWriter,
    "trackio": TrackioWriter,
}


def open_writer(kind: str, folder: Path, run: SinkRun) -> Writer:
    """Open the writer of a run.

    Raises:
        SinkError: the package of the sink is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return WRITERS[kind](folder, run)
    except ModuleNotFoundError as error:
        raise SinkError(
            f"--to {kind}: the package {error.name} is not installed; "
            f"pip install -e '.[{kind}]' installs it"
        ) from error
