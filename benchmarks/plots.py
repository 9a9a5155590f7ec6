"""Plots as SVG, without any package: lines over a logarithmic or linear scale, with a legend."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 52
COLOURS = ("#c1272d", "#0072b2", "#009e73", "#e69f00", "#7b4ea3", "#56b4e9", "#555555", "#b0744f")


class _Scale:
    def __init__(self, values: Sequence[float], pixels: tuple[float, float], log: bool):
        self._log, self._pixels = log, pixels
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        else:
            low = min(low, 0.0)
        margin = (high - low or 1.0) * 0.05
        self._low = low if not log and low == 0 else low - margin
        self._high = high + margin

    def at(self, value: float) -> float:
        part = ((math.log10(value) if self._log else value) - self._low) / (self._high - self._low)
        return self._pixels[0] + part * (self._pixels[1] - self._pixels[0])

    def ticks(self) -> list[float]:
        if self._log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            return [tick for tick in found if self._low <= math.log10(tick) <= self._high]
        step = 10.0 ** math.floor(math.log10((self._high - self._low) / 3))
        step *= next(m for m in (1, 2, 5, 10) if (self._high - self._low) / (m * step) <= 7)
        first = math.ceil(self._low / step)
        return [i * step for i in range(first, math.floor(self._high / step) + 1)]


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    dashed: Sequence[str] = (),
) -> str:
    """An SVG document with a line and its points for each series.

    Args:
        series: name to points (x, y); on a logarithmic scale points that are not positive are left out.
        title: above the plot.
        x, y: what the axes say.
        log_x, log_y: which scales are logarithmic.
        x_ticks: where the x axis has its ticks; chosen if None.
        dashed: names of series with a broken line.

    Raises:
        ValueError: there is no point to draw.
    """
    shown = {
        name: [(a, b) for a, b in points if (a > 0 or not log_x) and (b > 0 or not log_y)]
        for name, points in series.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        raise ValueError("no point to draw")
    every = [point for points in shown.values() for point in points]
    across = _Scale([a for a, _ in every], (LEFT, WIDTH - RIGHT), log_x)
    up = _Scale([b for _, b in every], (HEIGHT - BOTTOM, TOP), log_y)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14">{html.escape(title)}</text>',
    ]
    for tick in across.ticks() if x_ticks is None else x_ticks:
        at = across.at(tick)
        out.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        out.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>')
    for tick in up.ticks():
        at = up.at(tick)
        out.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">{html.escape(x)}</text>')
    out.append(
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y)}</text>"
    )
    for index, (name, points) in enumerate(shown.items()):
        colour, broken = COLOURS[index % len(COLOURS)], ' stroke-dasharray="5 4"' if name in dashed else ""
        places = [(across.at(a), up.at(b)) for a, b in sorted(points)]
        path = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{broken}/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in places]
        row = TOP + 10 + 20 * index
        out.append(f'<path d="M{WIDTH - RIGHT + 14} {row}h26" stroke="{colour}" stroke-width="2"{broken}/>')
        out.append(f'<text x="{WIDTH - RIGHT + 46}" y="{row + 4}">{html.escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def save(path: Path, document: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
