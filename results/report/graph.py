"""The runs and what each needs, as a drawing in layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

WIDTH, HEIGHT, ACROSS, DOWN, EDGE = 206, 46, 44, 14, 4


@dataclass(frozen=True)
class Node:
    """A run: planned, under way, failed, or done; `needs` are ids of runs."""

    run_id: str
    stage: str
    name: str
    state: str = "done"
    detail: str = ""
    needs: tuple[str, ...] = ()


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
    """Nodes in columns by how many runs come before them; the order within a column is the given one."""
    by_id = {node.run_id: node for node in nodes}

    @cache
    def depth(run_id: str) -> int:
        return max((1 + depth(need) for need in by_id[run_id].needs if need in by_id), default=0)

    rows: dict[int, int] = {}
    boxes = []
    for node in nodes:
        column = depth(node.run_id)
        row = rows.get(column, 0)
        rows[column] = row + 1
        boxes.append(Placed(node, EDGE + column * (WIDTH + ACROSS), EDGE + row * (HEIGHT + DOWN)))
    places = {box.node.run_id: box for box in boxes}
    curves = tuple(curve for box in boxes for curve in _curves(box, places))
    width = max((box.x + WIDTH for box in boxes), default=0) + EDGE
    height = max((box.y + HEIGHT for box in boxes), default=0) + EDGE
    return Graph(tuple(boxes), curves, width, height)


def _curves(box: Placed, places: Mapping[str, Placed]) -> list[str]:
    """A path from the right edge of each run that is needed to the left edge of the box."""
    paths = []
    for need in box.node.needs:
        if need in places:
            x1, y1 = places[need].x + WIDTH, places[need].y + HEIGHT // 2
            x2, y2 = box.x, box.y + HEIGHT // 2
            bend = max(ACROSS // 2, (x2 - x1) // 2)
            paths.append(f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}")
    return paths
