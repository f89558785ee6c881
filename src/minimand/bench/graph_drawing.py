"""A directed acyclic graph as an SVG: nodes in layers, every edge downwards, long edges led around the nodes."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

_BOX, _GAP, _VIA = 24, 16, 10
_SWEEPS = 12


def draw_graph(names: Sequence[str], edges: Sequence[tuple[int, int, float, str]], *, label: str) -> str:
    """Draw a graph.

    A node stands a layer below its lowest parent. Long edges pass through a place of their own in each layer between,
    and places are ordered by the middle of their neighbours' places, back and forth, which leaves few crossings.

    Args:
        names: Of the nodes.
        edges: ``(tail, head, strength, title)``: strength in [-1, 1] sets width, and the dashes where negative; the
            title is shown on pointing.
        label: Of the whole drawing, for screen readers.

    Returns:
        The ``<svg>`` element; it takes its colours from the page.
    """
    layers, paths = _layers(len(names), edges)
    _untangle(layers, paths)
    widths = {node: max(28.0, 16 + 7.2 * len(_short(names[node]))) for node in range(len(names))}
    x, width = _places(layers, paths, widths)
    pitch = max(64, round(width / 14))  # wide layers need steeper edges to be told apart
    height = pitch * (len(layers) - 1) + _BOX
    row = {place: number for number, layer in enumerate(layers) for place in layer}
    parts = []
    for (_, head, strength, title), path in zip(edges, paths, strict=True):
        size = 0.8 + 2.2 * min(abs(strength), 1.0)
        dashes = ' stroke-dasharray="6 4"' if strength < 0 else ""
        points = [(x[place], pitch * row[place] + _BOX / 2) for place in path]
        points[0] = (points[0][0], points[0][1] + _BOX / 2)
        points[-1] = (x[head], points[-1][1] - _BOX / 2 - 3)
        parts.append(
            f'<path d="{_curve(points)}" fill="none" stroke="currentColor" stroke-width="{size:.1f}" opacity="0.6"'
            f'{dashes} marker-end="url(#graph-head)"><title>{html.escape(title)}</title></path>'
        )
    for node, name in enumerate(names):
        left, top = x[node] - widths[node] / 2, pitch * row[node]
        parts.append(
            f'<g><title>{html.escape(name)}</title><rect x="{left:.1f}" y="{top}" width="{widths[node]:.1f}" '
            f'height="{_BOX}" rx="6" fill="var(--raised, Canvas)" stroke="currentColor"/>'
            f'<text x="{x[node]:.1f}" y="{top + 16}" text-anchor="middle">{html.escape(_short(name))}</text></g>'
        )
    head_mark = (
        '<defs><marker id="graph-head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="9" markerHeight="9" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.5L8 4L0 7.5Z" fill="currentColor"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {width + 8:.0f} {height + 8}" '
        f'width="{width + 8:.0f}" style="min-width:{0.7 * width:.0f}px" role="img" '
        f'aria-label="{html.escape(label)}" font-family="inherit" font-size="12" '
        f'fill="currentColor">{head_mark}{"".join(parts)}</svg>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _layers(count: int, edges: Sequence[tuple[int, int, float, str]]) -> tuple[list[list[int]], list[list[int]]]:
    """Give every node a layer and every edge the places it passes through; what is not a node is a bend."""
    parents: list[list[int]] = [[] for _ in range(count)]
    for tail, head, *_ in edges:
        parents[head].append(tail)
    depth: dict[int, int] = {}

    def settle(node: int) -> int:
        if node not in depth:
            depth[node] = max((settle(parent) + 1 for parent in parents[node]), default=0)
        return depth[node]

    for node in range(count):
        settle(node)
    # A root moves down to just above its first child: no edge is longer than it must be.
    children: list[list[int]] = [[] for _ in range(count)]
    for tail, head, *_ in edges:
        children[tail].append(head)
    for node in range(count):
        if not parents[node] and children[node]:
            depth[node] = min(depth[child] for child in children[node]) - 1
    layers: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in range(count):
        layers[depth[node]].append(node)
    paths, bend = [], count
    for tail, head, *_ in edges:
        path = [tail]
        for level in range(depth[tail] + 1, depth[head]):
            layers[level].append(bend)
            path.append(bend)
            bend += 1
        paths.append([*path, head])
    return layers, paths


def _neighbours(paths: Sequence[Sequence[int]]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for path in paths:
        for upper, lower in itertools.pairwise(path):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    return above, below


def _untangle(layers: list[list[int]], paths: Sequence[Sequence[int]]) -> None:
    above, below = _neighbours(paths)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            near = above if down else below
            rank = {place: number for other in layers for number, place in enumerate(other)}
            middle = {
                place: sum(rank[one] for one in near[place]) / len(near[place]) if near.get(place) else rank[place]
                for place in layer
            }
            layer.sort(key=lambda place: (middle[place], rank[place]))
        crossings = _crossings(layers, below)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _crossings(layers: Sequence[Sequence[int]], below: dict[int, list[int]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(layers):
        rank = {place: number for number, place in enumerate(lower)}
        ends = [sorted(rank[one] for one in below.get(place, ())) for place in upper]
        seen: list[int] = []
        for group in ends:
            total += sum(1 for end in group for other in seen if other > end)
            seen += group
    return total


def _places(
    layers: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], widths: dict[int, float]
) -> tuple[dict[int, float], float]:
    """Set each place's middle: near those of its neighbours, without overlap."""

    def room(place: int) -> float:
        return widths.get(place, _VIA)

    x: dict[int, float] = {}
    for layer in layers:
        at = 0.0
        for place in layer:
            x[place] = at + room(place) / 2
            at += room(place) + _GAP
        for place in layer:
            x[place] -= at / 2
    above, below = _neighbours(paths)
    for sweep in range(2 * _SWEEPS):
        near = above if sweep % 2 == 0 else below
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = [
                sum(x[one] for one in near[place]) / len(near[place]) if near.get(place) else x[place]
                for place in layer
            ]
            # Pushed apart from the left and from the right; the mean of both keeps distances and is centred.
            left, right = list(wanted), list(wanted)
            for number in range(1, len(layer)):
                least = (room(layer[number - 1]) + room(layer[number])) / 2 + _GAP
                left[number] = max(left[number], left[number - 1] + least)
            for number in range(len(layer) - 2, -1, -1):
                least = (room(layer[number]) + room(layer[number + 1])) / 2 + _GAP
                right[number] = min(right[number], right[number + 1] - least)
            for number, place in enumerate(layer):
                x[place] = (left[number] + right[number]) / 2
    start = min(x[place] - room(place) / 2 for place in x)
    end = max(x[place] + room(place) / 2 for place in x)
    return {place: value - start for place, value in x.items()}, end - start


def _curve(points: Sequence[tuple[float, float]]) -> str:
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        parts.append(f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}")
    return "".join(parts)
