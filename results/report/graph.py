"""The runs and what each needs, as a drawing in columns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Sizes in pixels: a box, the gaps between columns and between rows, the margin around the drawing.
WIDTH = 206
HEIGHT = 46
COLUMN_GAP = 44
ROW_GAP = 14
MARGIN = 4


@dataclass(frozen=True)
class Node:
    """A run in any state; `needs` are the ids of the runs it needs."""

    run_id: str
    stage: str
    name: str
    state: str = "done"
    detail: str = ""
    needs: tuple[str, ...] = ()
    # What its attempts cost so far.
    seconds: float = 0.0
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Placed:
    """A node with the position of its box."""

    node: Node
    x: int
    y: int


@dataclass(frozen=True)
class Graph:
    """Boxes, the curves between them (SVG paths), and the size of the drawing."""

    boxes: tuple[Placed, ...]
    curves: tuple[str, ...]
    width: int
    height: int


def lay_out_graph(nodes: Sequence[Node]) -> Graph:
    """Return the drawing: a run stands one column to the right of the last run it needs.

    The nodes come after those they need. Within a column they keep the given order.
    """
    # The longest way from a run without needs. A need that is not drawn does not count, nor does
    # one that comes later: damaged records may need each other.
    columns: dict[str, int] = {}
    rows: Counter[int] = Counter()
    places: dict[str, Placed] = {}
    for node in nodes:
        column = max((1 + columns[need] for need in node.needs if need in columns), default=0)
        columns[node.run_id] = column
        y = MARGIN + rows[column] * (HEIGHT + ROW_GAP)
        places[node.run_id] = Placed(node, MARGIN + column * (WIDTH + COLUMN_GAP), y)
        rows[column] += 1
    boxes = tuple(places.values())
    curves = tuple(
        _curve(places[need], box) for box in boxes for need in box.node.needs if need in places
    )
    # Without any run the drawing is a margin wide.
    width = max((box.x + WIDTH for box in boxes), default=0) + MARGIN
    height = max((box.y + HEIGHT for box in boxes), default=0) + MARGIN
    return Graph(boxes, curves, width, height)


def _curve(needed: Placed, box: Placed) -> str:
    """Return a curve from the right edge of a needed run to the left edge of a box."""
    x1 = needed.x + WIDTH
    y1 = needed.y + HEIGHT // 2
    x2 = box.x
    y2 = box.y + HEIGHT // 2
    # Control points at the height of the two ends: the curve leaves and arrives level.
    bend = max(COLUMN_GAP // 2, (x2 - x1) // 2)
    return f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
