"""Random synthetic signs: boards, price tags, plates and screens with text to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from vlm_sft.data.demo.fonts import text_width
from vlm_sft.data.demo.vocabulary import BRANDS, GOODS, NAMES, NOTES, NOTICES, PLACES, REGIONS, ROADS, SHOPS, TITLES

SIZES = ((96, 48), (128, 64), (160, 80), (192, 96))
SMALLEST_TEXT_PX = 11
MAX_ATTEMPTS = 400
SIGN_FONTS = tuple(
    "sans, sans bold, sans bold, sans oblique, serif, serif bold, "
    "times bold, computer sans, computer bold, pillow".split(", ")
)
WIDE_FONTS = ("mono bold", "sans bold", "mono")
# Board and text colours with a strong contrast.
BOARDS = (
    ("#ffffff", "#111111"),
    ("#ffffff", "#b01717"),
    ("#ffffff", "#15408f"),
    ("#f7e463", "#111111"),
    ("#b51d1d", "#ffffff"),
    ("#14663a", "#ffffff"),
    ("#174a94", "#ffffff"),
    ("#222222", "#ffffff"),
    ("#222222", "#ffd23c"),
    ("#efe2c4", "#4a2c12"),
    ("#4d2b17", "#f6e7c8"),
    ("#f2a33a", "#111111"),
    ("#5b2a7e", "#ffffff"),
    ("#d6ecf5", "#143252"),
)
ROAD_BOARDS = (("#14663a", "#ffffff"), ("#174a94", "#ffffff"), ("#ffffff", "#111111"))
PLATE_BOARDS = (("#ffffff", "#111111"), ("#ffffff", "#15408f"), ("#f7d94a", "#111111"))
SCREEN_BOARDS = (("#101010", "#ffb52e"), ("#101010", "#59e36b"), ("#0d1b33", "#d8efff"), ("#101010", "#ffffff"))
SCENES = ("#b9c4c9", "#8fa3ad", "#c9bda9", "#a7b59a", "#7d8590", "#d8d3c9", "#9a8c7c", "#ffffff")


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line of text on a sign.

    Attributes:
        role: what the text is, e.g. "name", "price" or "number"; questions ask for it.
        centre_y: pixels from the top before rotation.
    """

    role: str
    text: str
    font: str
    size_px: int
    centre_y: int


@dataclass(frozen=True, slots=True)
class SignSpec:
    """One sign.

    Attributes:
        sign_type: a key of SIGN_TYPES.
        width, height: pixels, multiples of 16.
        scene, board, ink: "#rrggbb" of the surroundings, of the board, and of text and border.
        margin, border, radius: pixels: around the board, of its frame, of its corners.
        rotation_degrees: counterclockwise.
        noise: half the range of the uniform noise, in grey levels of 255.
        noise_seed: of that noise.
        lines: from top to bottom.
    """

    sign_type: str
    width: int
    height: int
    scene: str
    board: str
    ink: str
    margin: int
    border: int
    radius: int
    rotation_degrees: float
    noise: int
    noise_seed: int
    lines: tuple[TextLine, ...]


@dataclass(frozen=True, slots=True)
class SignType:
    """A type of sign.

    Attributes:
        thing: how a question names it.
        write: draws its (role, text, share of the height) from top to bottom.
        boards, fonts: to choose from.
    """

    thing: str
    write: Callable[[Random], list[tuple[str, str, float]]]
    boards: tuple[tuple[str, str], ...] = BOARDS
    fonts: tuple[str, ...] = SIGN_FONTS


def random_sign(rng: Random, sign_type: str | None = None) -> SignSpec:
    """Draw a random sign whose text fits its board.

    Args:
        rng: the only source of randomness; equal states give equal signs.
        sign_type: a key of SIGN_TYPES; drawn at random when None.
    """
    name = rng.choice(tuple(SIGN_TYPES)) if sign_type is None else sign_type
    width, height = rng.choice(SIZES)
    for _ in range(MAX_ATTEMPTS):
        spec = _propose(rng, name, width, height)
        if spec is not None:
            return spec
    raise AssertionError(f"no {name} of {width}x{height} fits after {MAX_ATTEMPTS} attempts")


def _propose(rng: Random, name: str, width: int, height: int) -> SignSpec | None:
    kind = SIGN_TYPES[name]
    board, ink = rng.choice(kind.boards)
    margin, border = rng.choice((0, 2, 3, 4)), rng.choice((0, 1, 1, 2))
    rotation = 0.0 if rng.random() < 0.4 else round(rng.uniform(-5, 5), 1)
    tilt = math.sin(math.radians(abs(rotation)))
    inset = 2 * (margin + border + 2)
    lines = _typeset(rng, kind, width - inset - 4 - height * tilt, height - inset - 0.8 * width * tilt, height)
    if lines is None:
        return None
    return SignSpec(
        sign_type=name,
        width=width,
        height=height,
        scene=rng.choice(SCENES),
        board=board,
        ink=ink,
        margin=margin,
        border=border,
        radius=rng.choice((0, 0, 3, 6)),
        rotation_degrees=rotation,
        noise=rng.choice((0, 0, 4, 8, 14)),
        noise_seed=rng.randrange(2**31),
        lines=lines,
    )


def _typeset(rng: Random, kind: SignType, room_x: float, room_y: float, height: int) -> tuple[TextLine, ...] | None:
    """Choose text and font sizes; None when a line would be too small to read."""
    written = kind.write(rng)
    font = rng.choice(kind.fonts)
    total = sum(share for _, _, share in written)
    fill = rng.uniform(0.62, 0.8)
    top = (height - room_y) / 2
    lines = []
    for role, text, share in written:
        line_height = room_y * share / total
        size = int(line_height * fill)
        size = min(size, int(size * room_x / max(text_width(font, max(size, 1), text), 1)))
        if size < SMALLEST_TEXT_PX:
            return None
        lines.append(TextLine(role, text, font, size, round(top + line_height / 2)))
        top += line_height
    return tuple(lines)


def _cased(rng: Random, text: str) -> str:
    return rng.choice((text, text, text.upper()))


def _notice(rng: Random) -> list[tuple[str, str, float]]:
    text = rng.choice(NOTICES)
    lines = [("notice", rng.choice((text, text, text.capitalize())), 1.4)]
    if rng.random() < 0.5:
        lines.append(("note", rng.choice(NOTES), 1))
    return lines


def _shop(rng: Random) -> list[tuple[str, str, float]]:
    name = rng.choice((rng.choice(NAMES), f"{rng.choice(NAMES)}'s"))
    return [("name", _cased(rng, name), 1.2), ("shop", _cased(rng, rng.choice(SHOPS)), 1)]


def _price(rng: Random) -> list[tuple[str, str, float]]:
    cents = rng.choice(("00", "20", "25", "49", "50", "75", "80", "90", "95", "99"))
    lines = [("item", _cased(rng, rng.choice(GOODS)), 1), ("price", f"${rng.randint(1, 49)}.{cents}", 1.5)]
    return lines if rng.random() < 0.7 else lines[::-1]


def _plate(rng: Random) -> list[tuple[str, str, float]]:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=3))
    number = f"{rng.randint(100, 9999)}"
    plate = rng.choice((f"{letters} {number}", f"{number} {letters}"))
    return [("region", rng.choice(REGIONS), 1), ("plate", plate, 1.7)]


def _bus(rng: Random) -> list[tuple[str, str, float]]:
    return [("bus number", str(rng.randint(1, 299)), 1.3), ("destination", _cased(rng, rng.choice(PLACES)), 1)]


def _screen(rng: Random) -> list[tuple[str, str, float]]:
    day = rng.choice(("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN"))
    month = rng.choice(("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"))
    date = f"{day} {rng.randint(1, 28)} {month}"
    return [("time", f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}", 1.6), ("date", date, 1)]


def _label(rng: Random) -> list[tuple[str, str, float]]:
    small = f"{rng.choice((100, 150, 200, 250, 330, 400, 500, 750))} {rng.choice(('g', 'ml'))}"
    amount = rng.choice((small, small, f"{rng.randint(1, 9)} kg"))
    lines = [("brand", _cased(rng, rng.choice(BRANDS)), 1.3), ("product", _cased(rng, rng.choice(GOODS)), 1)]
    return lines if rng.random() < 0.4 else [*lines, ("amount", amount, 1)]


def _road(rng: Random) -> list[tuple[str, str, float]]:
    street = f"{rng.choice(ROADS)} {rng.choice(('Street', 'St', 'Ave', 'Road', 'Rd', 'Lane', 'Drive'))}"
    return [("street", _cased(rng, street), 1.2), ("block", str(rng.randint(1, 99) * 100), 1)]


def _limit(rng: Random) -> list[tuple[str, str, float]]:
    words = rng.choice(("SPEED LIMIT", "SPEED", "MAX SPEED", "ZONE"))
    return [("limit text", words, 1), ("limit", str(rng.randint(1, 26) * 5), 1.7)]


def _jersey(rng: Random) -> list[tuple[str, str, float]]:
    return [("player", rng.choice(NAMES).upper(), 1), ("number", str(rng.randint(1, 99)), 1.8)]


def _book(rng: Random) -> list[tuple[str, str, float]]:
    author = f"{rng.choice('ABCDEFGHJKLMNPRST')}. {rng.choice(NAMES)}"
    return [("title", _cased(rng, rng.choice(TITLES)), 1.2), ("author", author, 1)]


SIGN_TYPES: dict[str, SignType] = {
    "notice": SignType("sign", _notice),
    "shop": SignType("shop sign", _shop),
    "price tag": SignType("price tag", _price),
    "plate": SignType("license plate", _plate, PLATE_BOARDS, WIDE_FONTS),
    "bus": SignType("bus", _bus, SCREEN_BOARDS, WIDE_FONTS),
    "screen": SignType("screen", _screen, SCREEN_BOARDS, WIDE_FONTS),
    "label": SignType("label", _label),
    "street sign": SignType("street sign", _road, ROAD_BOARDS),
    "speed limit": SignType("sign", _limit, (("#ffffff", "#111111"), ("#ffffff", "#b01717"))),
    "jersey": SignType("jersey", _jersey),
    "book": SignType("book cover", _book),
}
