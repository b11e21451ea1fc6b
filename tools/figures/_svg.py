"""SVG drawings on a transparent ground, whose colours follow the reader's light or dark mode."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

# The report's colours (megatron_srpo/observe/page/page.css): light, dark.
COLORS = {
    "ink": ("#22252a", "#dfe2e7"),
    "quiet": ("#5f656d", "#9aa1ab"),
    "line": ("#d6d6d0", "#3a404a"),
    "blue": ("#2f5fc4", "#7da2f0"),
    "orange": ("#c2610f", "#e8985a"),
    "green": ("#1d8560", "#54c299"),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def _rules(mode: int) -> str:
    """Return `.f-NAME` (fill) and `.s-NAME` (stroke) for all colours; mode 0: light, 1: dark."""
    return "".join(
        f".f-{name}{{fill:{both[mode]}}}.s-{name}{{stroke:{both[mode]}}}" for name, both in COLORS.items()
    )


class Drawing:
    """An SVG of fixed size; coordinates in its own pixels, y downwards."""

    def __init__(self, width: int, height: int, title: str, description: str):
        style = f"text{{font-family:{_FONT}}}.s{{fill:none}}{_rules(0)}"
        style += f"@media (prefers-color-scheme:dark){{{_rules(1)}}}"
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            f' height="{height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>{style}</style>",
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        color: str = "ink",
        size: float = 14,
        bold: bool = False,
        **more: str,
    ) -> None:
        """Draw one line; `more` are attributes such as text_anchor="middle"."""
        weight = {"font-weight": "600"} if bold else {}
        attributes = {"class": f"f-{color}", "x": x, "y": y, "font-size": size, **weight, **_named(more)}
        self._add("text", attributes, escape(text))

    def rect(self, x: float, y: float, width: float, height: float, radius: float = 0, **more: str) -> None:
        box = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
        self._add("rect", {**_named(more), **box})

    def path(self, d: str, color: str, width: float = 1.5, **more: str) -> None:
        """Draw an open line of `width` pixels."""
        self._add("path", {"class": f"s s-{color}", "d": d, "stroke-width": width, **_named(more)})

    def area(self, points: Iterable[tuple[float, float]], color: str, opacity: float) -> None:
        d = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points) + "Z"
        self._add("path", {"class": f"f-{color}", "d": d, "opacity": opacity})

    def polyline(self, points: Iterable[tuple[float, float]], color: str, width: float, **more: str) -> None:
        d = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.path(d, color, width, stroke_linejoin="round", **more)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")

    def _add(self, tag: str, attributes: dict[str, str | float], content: str = "") -> None:
        written = " ".join(f'{name}="{_short(value)}"' for name, value in attributes.items())
        self._parts.append(f"<{tag} {written}>{content}</{tag}>" if content else f"<{tag} {written}/>")


def _named(attributes: dict[str, str]) -> dict[str, str]:
    """Return Python's names as SVG's: text_anchor → text-anchor, class_ → class."""
    return {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}


def _short(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
