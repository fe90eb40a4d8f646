"""The command `sink`: pass the metrics of a reproduction on to a program that draws them.

It reads what trainings write to their metrics.jsonl, from a process of its own. How far it came is
in a file for each run, so that it goes on there when it is started again.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_json, write_json_atomic
from pipeline.identity import science_fields
from pipeline.spec import StageRun
from results.runs import flatten_config
from results.sinks.reader import MetricsReader, Point
from results.sinks.writers import SinkRun, Writer, open_writer

# Points of one write: a file of an earlier training has a hundred thousand.
PART = 1000


@dataclass
class Feed:
    """One run on its way to a sink."""

    run: SinkRun
    reader: MetricsReader
    note: Path
    writer: Writer | None = None


class Sink:
    """The runs of a reproduction and the sink that they go to, in `folder`.

    Raises:
        SinkError: the package of the sink is not installed.
    """

    def __init__(
        self, kind: str, folder: Path, runs: Sequence[StageRun], root: Path, group: str
    ) -> None:
        self.kind = kind
        self.folder = folder
        # Points that were passed on, by the name of the run.
        self.counts: Counter[str] = Counter()
        self.feeds = [open_feed(kind, folder, run, root, group) for run in runs]

    def pass_on(self) -> None:
        """Pass on what was written since the last call."""
        for feed in self.feeds:
            for points in split(feed.reader.read_new(), PART):
                # Only runs that train have points, and get a writer.
                if feed.writer is None:
                    feed.writer = open_writer(self.kind, self.folder, feed.run)
                feed.writer.write(points)
                # After the points: a crash in between sends them twice, and loses none.
                write_json_atomic(
                    feed.note, {"position": feed.reader.position, "last": feed.reader.last}
                )
                self.counts[feed.run.name] += len(points)

    def close(self) -> None:
        """Close all writers."""
        for feed in self.feeds:
            if feed.writer is not None:
                feed.writer.close()


def open_feed(kind: str, folder: Path, run: StageRun, root: Path, group: str) -> Feed:
    """Return the feed of a run, which goes on where the last sink into this folder stopped."""
    settings = flatten_config(science_fields(run.config))
    sink_run = SinkRun(group, run.own_name or run.name, run.run_id, settings)
    note = folder / "passed_on" / f"{kind}-{sink_run.key}.json"
    reader = MetricsReader(run.run_dir(root) / "metrics.jsonl")
    known = read_json(note)
    if known is not None:
        reader.position = int(known["position"])
        reader.last = {name: int(step) for name, step in known["last"].items()}
    return Feed(sink_run, reader, note)


def split(points: Iterator[Point], size: int) -> Iterator[list[Point]]:
    """Yield the points in lists of at most `size`."""
    part: list[Point] = []
    for point in points:
        part.append(point)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
