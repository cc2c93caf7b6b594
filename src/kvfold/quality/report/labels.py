"""Where to write names beside points so that nothing covers anything. Pixels throughout, y downwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "Label", "Segment", "place", "spread"]

Segment = tuple[float, float, float, float]

_DIRECTIONS = tuple((math.cos(angle), math.sin(angle)) for angle in (math.tau * step / 24 for step in range(24)))
_RINGS = (2.0, 9.0, 18.0, 29.0, 42.0, 58.0, 78.0, 104.0)
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; ``y0`` is its upper edge."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return width * height if width > 0 and height > 0 else 0.0

    def length_inside(self, segment: Segment) -> float:
        """How much of ``segment`` runs through it (Liang and Barsky)."""
        x, y, to_x, to_y = segment
        dx, dy = to_x - x, to_y - y
        start, end = 0.0, 1.0
        for delta, room in ((-dx, x - self.x0), (dx, self.x1 - x), (-dy, y - self.y0), (dy, self.y1 - y)):
            if delta == 0.0:
                if room < 0:
                    return 0.0
            elif delta < 0:
                start = max(start, room / delta)
            else:
                end = min(end, room / delta)
        return max(end - start, 0.0) * math.hypot(dx, dy)


@dataclass(frozen=True, slots=True)
class Label:
    """A placed name: its box, and the line back to its point if it stands apart."""

    box: Box
    leader: Segment | None


@dataclass(frozen=True, slots=True)
class _Choice:
    label: Label
    cost: float


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    *,
    radius: float,
    lines: Sequence[Segment] = (),
    faint: Sequence[Segment] = (),
) -> list[Label]:
    """A place for the name of each point: near it, within ``bounds``, off other names, points and ``lines``.

    Each name in turn takes the cheapest of its places given the others, until none moves. That ends in a state that
    depends on who chose first, so several orders are tried and the best end is kept.
    ``radius``: how much room a point's marker needs. ``faint`` lines are kept off where that is easy.
    """
    choices = [_choices(number, anchors, size, bounds, radius, lines, faint) for number, size in enumerate(sizes)]
    crowd = [sum(1.0 / (20.0 + math.dist(anchor, other)) for other in anchors) for anchor in anchors]
    by_crowd = sorted(range(len(anchors)), key=lambda number: (-crowd[number], number))
    by_x, by_y = (sorted(by_crowd, key=lambda number: anchors[number][axis]) for axis in (0, 1))
    by_width = sorted(by_crowd, key=lambda number: -sizes[number][0])
    orders = [by_crowd, by_x, by_x[::-1], by_y, by_y[::-1], by_width, by_width[::-1], by_crowd[::-1]]
    _, labels = min((_settle(choices, order) for order in orders), key=lambda end: end[0])
    return labels


def _settle(choices: Sequence[Sequence[_Choice]], order: Sequence[int]) -> tuple[float, list[Label]]:
    """Let each name choose in ``order`` until none moves: the cost of what comes of it, and the labels."""
    placed: dict[int, _Choice] = {}
    for _ in range(_ROUNDS):
        moved = False
        for number in order:
            others = [choice.label for index, choice in placed.items() if index != number]
            best = _cheapest(choices[number], others)
            moved = moved or placed.get(number) is not best
            placed[number] = best
        if not moved:
            break
    labels = [placed[number].label for number in range(len(choices))]
    cost = sum(choice.cost for choice in placed.values())
    cost += sum(_conflict(label, labels[:index]) for index, label in enumerate(labels))
    return cost, labels


def _choices(
    number: int,
    anchors: Sequence[tuple[float, float]],
    size: tuple[float, float],
    bounds: Box,
    radius: float,
    lines: Sequence[Segment],
    faint: Sequence[Segment],
) -> list[_Choice]:
    """Every place round one point with the cost it has by itself."""
    x, y = anchors[number]
    width, height = size
    markers = [Box(px - radius, py - radius, px + radius, py + radius) for px, py in anchors]
    found = []
    for ring, distance in enumerate(_RINGS):
        for turn, (dx, dy) in enumerate(_DIRECTIONS):
            reach = radius + distance
            # Sideways a name begins at its marker's edge; above and below it is centred; between, it slides.
            cx = x + dx * reach + math.copysign(min(1.0, abs(dx) * 1.6), dx) * (abs(dx) > 1e-9) * width / 2
            cy = y + dy * reach + math.copysign(min(1.0, abs(dy) * 1.6), dy) * (abs(dy) > 1e-9) * height / 2
            cx = min(max(cx, bounds.x0 + width / 2), bounds.x1 - width / 2)
            cy = min(max(cy, bounds.y0 + height / 2), bounds.y1 - height / 2)
            box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            leader = _leader((x, y), box, radius) if ring else None
            cost = distance * 1.5 + (0.0 if turn == 0 else 0.5 if turn % 6 == 0 else 1.2)
            cost += sum(6.0 * (box.overlap(marker) > 0) * 20 for marker in markers)
            cost += sum(40.0 + 8.0 * inside for line in lines if (inside := box.length_inside(line)))
            cost += sum(4.0 + 1.5 * inside for line in faint if (inside := box.length_inside(line)))
            if leader:
                cost += 12.0 + sum(80.0 for i, m in enumerate(markers) if i != number and m.length_inside(leader) > 0)
            found.append(_Choice(Label(box, leader), cost))
    return sorted(found, key=lambda choice: choice.cost)


def _cheapest(choices: Sequence[_Choice], others: Sequence[Label]) -> _Choice:
    """The best of ``choices`` (by their own cost, rising) beside ``others``."""
    best, least = choices[0], math.inf
    for choice in choices:
        if choice.cost >= least:
            break
        cost = choice.cost + _conflict(choice.label, others)
        if cost < least:
            best, least = choice, cost
    return best


def _conflict(label: Label, others: Sequence[Label]) -> float:
    """What a place costs because of names already placed."""
    box = Box(label.box.x0 - 3, label.box.y0 - 1.5, label.box.x1 + 3, label.box.y1 + 1.5)
    cost = 0.0
    for other in others:
        if area := box.overlap(other.box):
            cost += 500.0 + 20.0 * area
        if other.leader and box.length_inside(other.leader) > 0:
            cost += 300.0
        if label.leader:
            cost += 300.0 * (other.box.length_inside(label.leader) > 0)
            cost += 60.0 * (other.leader is not None and _cross(label.leader, other.leader))
    return cost


def _leader(point: tuple[float, float], box: Box, radius: float) -> Segment:
    """From the edge of the marker to the nearest point of the box."""
    x, y = point
    to_x, to_y = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
    length = math.hypot(to_x - x, to_y - y) or 1.0
    return x + (to_x - x) / length * radius, y + (to_y - y) / length * radius, to_x, to_y


def _cross(one: Segment, two: Segment) -> bool:
    def side(ax: float, ay: float, bx: float, by: float, px: float, py: float) -> float:
        return (bx - ax) * (py - ay) - (by - ay) * (px - ax)

    apart = side(*one, *two[:2]) * side(*one, *two[2:])
    return apart < 0 and side(*two, *one[:2]) * side(*two, *one[2:]) < 0


def spread(wanted: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Heights as near as can be to ``wanted``, in the same order, ``pitch`` apart, between ``low`` and ``high``.

    Neighbours that are too close become a block, which stands at the mean of what its members want.
    """
    order = sorted(range(len(wanted)), key=lambda number: (wanted[number], number))
    if len(order) > 1:
        pitch = min(pitch, (high - low) / (len(order) - 1))
    blocks: list[tuple[float, list[int]]] = []  # where the first member stands, members
    for number in order:
        start, members = min(max(wanted[number], low), high), [number]
        while blocks and blocks[-1][0] + pitch * len(blocks[-1][1]) > start:
            members = blocks.pop()[1] + members
            start = sum(wanted[m] - pitch * place for place, m in enumerate(members)) / len(members)
            start = min(max(start, low), high - pitch * (len(members) - 1))
        blocks.append((start, members))
    heights = {m: start + pitch * place for start, members in blocks for place, m in enumerate(members)}
    return [heights[number] for number in range(len(wanted))]
