"""The fonts of the synthetic pictures: files that matplotlib ships, and Pillow's own.

Text is laid out by FreeType alone (no Raqm), so a picture does not depend on the shaping libraries of a machine.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from vlm_sft.common.errors import DataError

# Name -> (file below matplotlib's font folder, factor that makes fonts of one nominal size look equally large).
FONT_FILES: dict[str, tuple[str, float]] = {
    "sans": ("DejaVuSans.ttf", 1.0),
    "sans bold": ("DejaVuSans-Bold.ttf", 1.0),
    "sans oblique": ("DejaVuSans-Oblique.ttf", 1.0),
    "mono": ("DejaVuSansMono.ttf", 1.0),
    "mono bold": ("DejaVuSansMono-Bold.ttf", 1.0),
    "serif": ("DejaVuSerif.ttf", 1.0),
    "serif bold": ("DejaVuSerif-Bold.ttf", 1.0),
    "times": ("STIXGeneral.ttf", 1.15),
    "times bold": ("STIXGeneralBol.ttf", 1.15),
    "computer sans": ("cmss10.ttf", 1.15),
    "computer bold": ("cmb10.ttf", 1.15),
}
DEFAULT_FONT = "pillow"


def fonts() -> tuple[str, ...]:
    """Names of all fonts that `load_font` knows, in a fixed order."""
    return (*FONT_FILES, DEFAULT_FONT)


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    """Folder of matplotlib's fonts, found without importing matplotlib."""
    package = find_spec("matplotlib")
    if package is None or not package.submodule_search_locations:
        raise DataError("the synthetic pictures need the fonts of matplotlib", "pip install matplotlib")
    return Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=256)
def load_font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Load a font.

    Args:
        name: one of `fonts()`.
        size_px: nominal height of a line of text in pixels, at least 10 to stay legible.

    Raises:
        DataError: matplotlib, or a font file of it, is missing.
    """
    if name == DEFAULT_FONT:
        font = ImageFont.load_default(size_px)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font
    file_name, factor = FONT_FILES[name]
    path = _font_folder() / file_name
    try:
        return ImageFont.truetype(str(path), round(size_px * factor), layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"cannot read the font {path}: {error}", "reinstall matplotlib") from error


@lru_cache(maxsize=16384)
def text_width(name: str, size_px: int, text: str) -> int:
    """Width in pixels of one line of text, rounded up."""
    return -int(-load_font(name, size_px).getlength(text) // 1)
