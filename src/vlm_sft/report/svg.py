"""How a figure becomes markup or a file: palette, axes, SVG that takes the page's colours.

Figures are drawn with matplotlib in placeholder colours that become CSS variables of the page, so that one SVG suits
the light and the dark mode and the printer. The same figure is drawn in the colours of paper for a file.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SVG_LIMIT_BYTES = 300 * 1024
PNG_DOTS_PER_INCH = 160
PAPER_DOTS_PER_INCH = 300
WIDTH_INCHES = 4.2

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours of a figure: text and axes, grid, what is in the background, and the series, told apart by all eyes."""

    text: str
    grid: str
    faint: str
    series: tuple[str, ...]

    @property
    def first(self) -> str:
        """The colour of the tuned model, and of a single series."""
        return self.series[0]

    @property
    def second(self) -> str:
        """The colour of the base, and of what is measured on held-out data."""
        return self.series[1]


# Colours that nothing else uses, and the CSS that replaces each of them in the SVG.
PLACEHOLDERS = Palette(
    "#010203", "#010204", "#010205", ("#010206", "#010207", "#010208", "#010209", "#010210", "#010211")
)
STYLES = {
    PLACEHOLDERS.text: "currentColor",
    PLACEHOLDERS.grid: "var(--line)",
    PLACEHOLDERS.faint: "var(--faint)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(PLACEHOLDERS.series, start=1)},
}
PAPER = Palette("#1d2530", "#d5dbe3", "#9aa5b4", ("#1f5fbf", "#b4530a", "#0a7d6e", "#8a3fa0", "#7d6608", "#b3266b"))
# Series of one figure differ in more than colour.
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "solid",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1)),
    (0, (8, 3)),
)
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure.

    Attributes:
        title: what it is called.
        alt: what it shows in words.
        markup: SVG, or an image of it, safe to put into a page.
        draw: draws it in other colours, for a file.
    """

    title: str
    alt: str
    markup: str
    draw: Callable[[Palette], Figure]


def canvas(palette: Palette, x_label: str, y_label: str, height: float = 2.7) -> tuple[Figure, Axes]:
    """An empty figure of `height` inches with quiet axes and horizontal grid lines."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette.grid)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=palette.text, color=palette.grid, labelsize=9)
    axes.set_xlabel(x_label, color=palette.text, fontsize=9)
    axes.set_ylabel(y_label, color=palette.text, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def legend(axes: Axes, palette: Palette, columns: int = 3) -> None:
    """A legend above the axes, where it covers no curve."""
    shown = axes.legend(
        frameon=False,
        labelcolor=palette.text,
        fontsize=8,
        ncols=columns,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        handlelength=1.8,
        columnspacing=1.2,
        borderaxespad=0,
    )
    for text in shown.get_texts():
        text.set_parse_math(False)  # names come from files: a dollar sign in them must not start a formula


def rendered(title: str, alt: str, draw: Callable[[Palette], Figure], prefix: str) -> Drawing:
    """Draw as SVG, or as PNG in the colours of paper when the SVG would be large.

    Args:
        title: what the figure is called.
        alt: what it shows in words.
        draw: draws it in the colours of a palette.
        prefix: makes the ids inside the SVG unique in the page.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), warnings.catch_warnings():
        # The page's own fonts show the text; matplotlib only lacks glyphs to measure some of it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        svg = _svg(draw(PLACEHOLDERS), alt, f"{prefix}-{_slug(title)}")
        markup = svg if len(svg.encode("utf-8", "replace")) <= SVG_LIMIT_BYTES else _png(draw(PAPER), alt)
    return Drawing(title, alt, markup, draw)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _svg(figure: Figure, alt: str, prefix: str) -> str:
    """The figure as an SVG element that scales with the page and takes its colours."""
    text = _svg_text(figure)
    view_box = re.search(r'viewBox="([^"]*)"', text)
    assert view_box is not None, "matplotlib writes a viewBox"
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # Its style element would apply to the whole page, and its metadata names foreign addresses.
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{prefix}-", body)
    for placeholder, style in STYLES.items():
        body = body.replace(placeholder, style)
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg class="plot" role="img" aria-label="{html.escape(alt)}" viewBox="{view_box[1]}">{body}'


def _svg_text(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def _png(figure: Figure, alt: str) -> str:
    address = data_address("image/png", _png_bytes(figure, PNG_DOTS_PER_INCH))
    return f'<img class="plot" alt="{html.escape(alt)}" src="{address}">'


def _png_bytes(figure: Figure, dots_per_inch: int) -> bytes:
    figure.patch.set(alpha=1, facecolor="white")
    buffer = io.BytesIO()
    figure.set_dpi(dots_per_inch)
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def files(drawing: Drawing) -> dict[str, bytes]:
    """A figure for a paper, in the colours of paper: file name ending to content.

    Letters become outlines in the SVG, so that it looks the same wherever it is shown.
    """
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": drawing.title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return {
            "svg": _svg_text(drawing.draw(PAPER)).encode("utf-8", "replace"),
            "png": _png_bytes(drawing.draw(PAPER), PAPER_DOTS_PER_INCH),
        }


def data_address(kind: str, data: bytes) -> str:
    """Bytes of a media type as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
