"""Human units and static SVG plots for the report.

The plots are plain SVG text, so they show with scripts off, from file:// and in print. Identity is never
colour alone: every row has a colour from a colour-blind safe set (after Okabe and Ito, "Color Universal
Design", 2008) and a marker shape; the two cycles have coprime lengths, 8 and 7, so 56 rows are told apart.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 400, 290
LEFT, TOP, BOTTOM = 50, 14, 42
COLOURS = 8
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5L5 4H-5Z",
    "M0-5.5L5 0L0 5.5L-5 0Z",
    "M0 5L5-4H-5Z",
    "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "M0-5.2L4.9-1.6L3.1 4.3H-3.1L-4.9-1.6Z",
)


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits without an exponent for everyday sizes; an en dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        return f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return f"{value:.{digits - 1}e}"


def size(value: float | None) -> str:
    """Bytes in binary units: 612 MiB."""
    if value is None:
        return "–"
    power = min(int(math.log2(abs(value)) // 10), 4) if abs(value) >= 1 else 0
    scaled, unit = value / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{number(scaled, 3 if power else 1) if scaled < 1000 else round(scaled)} {unit}"


def millis(value: float | None, std: float | None = None) -> str:
    """Milliseconds: 14.2 ± 0.3 ms, or 1.20 s."""
    if value is None:
        return "–"
    scale, unit = (1, "ms") if value < 1000 else (1000, "s")
    return number(value / scale) + ("" if std is None else f" ± {number(std / scale, 1)}") + f" {unit}"


def duration(value: float | None) -> str:
    """Seconds: 0.31 s, 42 s, 3 min 20 s, 1 h 05 min."""
    if value is None:
        return "–"
    if value < 60:
        return f"{number(value, 2)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def count(value: float | None) -> str:
    """A count: 912, 295 k, 1.21 M."""
    if value is None:
        return "–"
    for scale, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{number(value / scale)}{unit}"
    return f"{value:.0f}"


def share(value: float | None) -> str:
    """A fraction in percent: 0.23%."""
    return "–" if value is None else f"{number(100 * value, 2 if value < 0.1 else 3)}%"


def lower_is_better(metric: str) -> bool:
    return "loss" in metric.lower() or "perplexity" in metric.lower()


def quality(metric: str, mean: float | None, spread: float | None = None) -> str:
    """93.1% ± 0.4 for a fraction, 1.234 ± 0.010 for a loss or a perplexity."""
    if mean is None:
        return "–"
    if lower_is_better(metric):
        return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    return f"{100 * mean:.1f}%" + ("" if spread is None else f" ± {100 * spread:.1f}")


def gap(metric: str, difference: float) -> str:
    """An absolute difference of quality: 2.3 points, or 0.120."""
    return f"{abs(difference):.3f}" if lower_is_better(metric) else f"{100 * abs(difference):.1f} points"


@dataclass
class Mark:
    """One row as the plots draw it: `x` a cost, `y` its quality, `curve` the points of its line, `style` a CSS
    class. `rank` 0 is the winner, and lower ranks are named and drawn on top first."""

    name: str
    style: str
    shape: int
    key: int
    x: float = math.nan
    y: float = math.nan
    spread: float = 0.0
    curve: Sequence[tuple[float, float]] = ()
    rank: int = 0
    competes: bool = True
    hover: str = ""


@dataclass
class Axis:
    """A scale from data to pixels: linear, or logarithmic where positive data span more than a factor
    `log_above`."""

    values: Iterable[float]
    start: float
    end: float
    unit: float = 1.0
    log_above: float = math.inf
    tight: bool = False
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        low, high = min(self.values) / self.unit, max(self.values) / self.unit
        self.log = low > 0 and high / low > self.log_above
        if self.log:
            margin = (high / low) ** 0.08
            low, high = low / margin, high * margin
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if high / low < 200 else (1,)
            self.ticks = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
        else:
            pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
            low, high = (low, high + (high == low)) if self.tight else (low - pad, high + pad)
            raw = (high - low) / 7
            scale = 10.0 ** math.floor(math.log10(raw))
            step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
            first = math.ceil(low / step - 1e-9)
            self.ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        value, low, high = value / self.unit, self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; attribute values are escaped, numbers rounded, `content` is markup already."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{v:.1f}" if isinstance(v, float) else str(v))}"'
        for key, v in attributes.items()
    )
    return f"<{name}{text}>{content}</{name}>"


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    return tag("text", escape(words), x=x, y=y, class_=class_, text_anchor=anchor)


def marker(mark: Mark, x: float, y: float) -> str:
    return tag("path", d=MARKERS[mark.shape], transform=f"translate({x:.1f} {y:.1f})", class_="marker")


def key_symbol(mark: Mark) -> str:
    """The row's marker alone, for legends and table rows."""
    symbol = tag("g", marker(mark, 7, 7), class_=mark.style)
    return tag("svg", symbol, width=14, height=14, viewBox="0 0 14 14", class_="key", aria_hidden="true")


def frame(x: Axis, y: Axis, x_title: str, y_title: str, y_tick: Callable[[float], str], right: float) -> str:
    """Grid, tick labels and axis titles."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks:
        at = y(tick * y.unit)
        parts.append(tag("line", x1=LEFT, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(text(LEFT - 6, at + 3.5, y_tick(tick), "tick", "end"))
    for tick in x.ticks:
        at = x(tick * x.unit)
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(text(at, bottom + 16, f"{tick:,.10g}", "tick", "middle"))
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 6, x_title, "title", "middle"))
    middle = (TOP + bottom) / 2
    parts.append(tag("g", text(0, 0, y_title, "title", "middle"), transform=f"translate(11 {middle:.1f}) rotate(-90)"))
    return "".join(parts)


def shorten(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"


def place_labels(marks: Sequence[tuple[float, float, Mark]], important: int, right: float) -> str:
    """Names beside their points, in the given order, each in the nearest free spot, with a leader line if that is
    far. All but the first `important` stay near, and go unnamed where the plot is full (hover and legend name
    them)."""
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py, _ in marks]
    parts = []
    for i, (px, py, mark) in enumerate(marks):
        words = shorten(mark.name, 22)
        wide, high = 5.9 * len(words), 11.0
        reaches = (11 if mark.rank == 0 else 8, 16, 27, 40, 54)
        for reach in reaches if i < important else reaches[:3] if len(marks) <= 20 else reaches[:1]:
            spots: list[tuple[float, float]] = [(reach, 0), (-reach, 0), (0, -reach - 2), (0, reach + 2)]
            spots += [(0.8 * reach * sx, 0.8 * reach * sy) for sx in (1, -1) for sy in (-1, 1)]
            for dx, dy in spots:
                x0 = px + dx - (0 if dx > 0 else wide if dx < 0 else wide / 2)
                y0 = py + dy - high / 2
                box = (x0, y0, x0 + wide, y0 + high)
                inside = box[0] >= LEFT + 2 and box[2] <= right and box[1] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM - 1
                if inside and not any(
                    box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
                ):
                    break
            else:
                continue
            taken.append(box)
            label = text(x0, y0 + 9, words, "label")
            if reach > 11:
                end = min(max(px, x0), x0 + wide)
                label += tag("line", x1=px, y1=py, x2=end, y2=py + dy, class_="leader")
            parts.append(tag("g", label, class_=mark.style, data_key=mark.key))
            break
    return "".join(parts)


def pareto(marks: Sequence[Mark], lower: bool) -> list[Mark]:
    """The competing marks that no other beats on both axes, by rising cost `x`; `lower`: a smaller `y` is
    better."""
    front: list[Mark] = []
    for mark in sorted((m for m in marks if m.competes), key=lambda m: (m.x, m.y if lower else -m.y)):
        if not front or (mark.y < front[-1].y if lower else mark.y > front[-1].y):
            front.append(mark)
    return front


def svg(content: str, title: str) -> str:
    return tag("svg", content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)


def scatter(marks: Sequence[Mark], metric: str, x_title: str, unit: float = 1.0, limit: float | None = None) -> str:
    """Quality against a cost (each mark's `x`, shown in `unit`), with spreads, the Pareto front and the
    budget's `limit`; "" without data."""
    if not marks:
        return ""
    lower, right, bottom = lower_is_better(metric), WIDTH - 12, HEIGHT - BOTTOM
    x = Axis([m.x for m in marks], LEFT, right, unit, log_above=5)
    ends = [m.y + s * m.spread for m in marks for s in (-1, 1)]
    y = Axis([e if lower else min(max(e, 0), 1) for e in ends], bottom, TOP, 1 if lower else 0.01)
    parts = [frame(x, y, x_title, metric.replace("_", " "), lambda t: f"{t:.10g}" + ("" if lower else "%"), right)]
    if limit is not None and x.low < limit / unit < x.high:
        parts.append(tag("line", x1=x(limit), x2=x(limit), y1=TOP, y2=bottom, class_="limit"))
        parts.append(text(x(limit) - 4, TOP + 2, "budget", "tick", "end"))
    front = pareto(marks, lower)
    if front:
        path = f"M{x(front[0].x):.1f} {y(front[0].y):.1f}"
        path += "".join(f"H{x(m.x):.1f}V{y(m.y):.1f}" for m in front[1:]) + f"H{right}"
        parts.append(tag("path", d=path, class_="front"))
    for mark in sorted(marks, key=lambda m: -m.rank):
        px, py = x(mark.x), y(mark.y)
        bar = tag("path", d=f"M{px:.1f} {y(mark.y - mark.spread):.1f}V{y(mark.y + mark.spread):.1f}", class_="bar")
        ring = tag("circle", cx=px, cy=py, r=8.5, class_="ring") if mark.rank == 0 else ""
        point = tag("title", escape(mark.hover)) + bar + ring + marker(mark, px, py)
        parts.append(tag("g", point, class_=mark.style, data_key=mark.key))
    leading = [m for m in marks if m.rank < 2 or m in front]
    order = sorted(leading, key=lambda m: m.rank) + [m for m in marks if m not in leading]
    parts.append(place_labels([(x(m.x), y(m.y), m) for m in order], len(leading), right))
    return svg("".join(parts), f"{metric} against {x_title} of the rows in the table above")


def curves(marks: Sequence[Mark], x_title: str, y_title: str, percent: bool = False) -> str:
    """One line per row through its `curve`, named at its end; "" without data. Fractions are shown in percent."""
    marks = [m for m in marks if len(m.curve) > 1]
    if not marks:
        return ""
    right, bottom = WIDTH - 116, HEIGHT - BOTTOM
    x = Axis([s for m in marks for s, _ in m.curve], LEFT, right, tight=True, log_above=20 if percent else math.inf)
    y = Axis([v for m in marks for _, v in m.curve], bottom, TOP, unit=0.01 if percent else 1, log_above=30)
    parts = [frame(x, y, x_title, y_title + " (log)" * y.log, lambda t: f"{t:.10g}" + "%" * percent, right)]
    ends = []
    for mark in sorted(marks, key=lambda m: -m.rank):
        stride = math.ceil(len(mark.curve) / 240)
        points = [*mark.curve[:-1:stride], mark.curve[-1]]
        path = "M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in points)
        end = (x(points[-1][0]), y(points[-1][1]))
        ends.append((*end, mark))
        hover = f"{mark.name}: {y_title} {number(points[-1][1])} at {x_title} {points[-1][0]:,.0f}"
        line = tag("path", d=path, class_="curve") + marker(mark, *end)
        parts.append(tag("g", tag("title", escape(hover)) + line, class_=mark.style, data_key=mark.key))
    room = int((bottom - TOP) // 12)
    named = sorted(sorted(ends, key=lambda e: e[2].rank)[:room], key=lambda e: e[1])
    spots = [min(max(e[1], TOP), bottom) for e in named]
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + 12)
    for i in range(len(spots) - 1, -1, -1):
        spots[i] = min(spots[i], bottom if i == len(spots) - 1 else spots[i + 1] - 12)
    for (px, py, mark), at in zip(named, spots, strict=True):
        leader = tag("line", x1=px + 6, y1=py, x2=right + 19, y2=at, class_="leader")
        name = text(right + 21, at + 3.5, shorten(mark.name, 15), "label")
        parts.append(tag("g", leader + name, class_=mark.style, data_key=mark.key))
    return svg("".join(parts), f"{y_title} by {x_title} of the rows in the table above")


def strip(mark: Mark, seeds: Sequence[float], low: float, high: float) -> str:
    """A row's seeds as dots and its mean as a bar, on the scale `low` to `high` of all its task's rows."""
    at = (lambda v: 4 + 82 * (v - low) / (high - low)) if high > low else (lambda v: 45.0)
    dots = "".join(tag("circle", cx=at(v), cy=7, r=2.2, class_="dot") for v in seeds)
    mean = tag("path", d=f"M{at(mark.y):.1f} 2V12", class_="mean")
    rail = tag("line", x1=2, x2=88, y1=7, y2=7, class_="grid")
    drawn = rail + tag("g", dots + mean, class_=mark.style)
    return tag("svg", drawn, width=90, height=14, viewBox="0 0 90 14", class_="strip", aria_hidden="true")
