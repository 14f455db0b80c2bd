"""Numbers and texts as people read them, the same in HTML and on the terminal."""

from __future__ import annotations

from datetime import datetime, timedelta

NOTHING = "–"  # shown where an artifact holds no value
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")  # in any locale


def percent(fraction: float | None) -> str:
    """An accuracy between 0 and 1 in percent with one decimal: 0.8064 is "80.6 %"."""
    return NOTHING if fraction is None else f"{100 * fraction:.1f} %"


def points(fraction: float | None) -> str:
    """A difference of accuracies in signed percentage points: 0.056 is "+5.6"."""
    return NOTHING if fraction is None else f"{100 * fraction:+.1f}"


def percent_interval(ends: tuple[float, float] | None) -> str:
    """An interval of accuracies in percent: (0.49, 0.55) is "[49.0, 55.0]"; "" when there is none."""
    return "" if ends is None else f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def points_interval(ends: tuple[float, float] | None) -> str:
    """An interval of differences in signed points: "[+1.0, +9.8]"; "" when there is none."""
    return "" if ends is None else f"[{points(ends[0])}, {points(ends[1])}]"


def p_value(value: float | None) -> str:
    """A p value with as many digits as anybody reads; "" when there is none."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated: "28,299"."""
    return NOTHING if value is None else f"{round(value):,}"


def plural(number_of: int, thing: str) -> str:
    """A number with its noun: "1 step", "2,048 steps"; `thing` is the singular of a plural in s."""
    return f"{number_of:,} {thing}{'' if number_of == 1 else 's'}"


def number(value: float | None) -> str:
    """A measured number with four significant digits; the usual notation where it is short."""
    return NOTHING if value is None else f"{value:.4g}"


def relative(fraction: float | None) -> str:
    """A relative difference in signed percent: 0.056 is "+5.6 %"."""
    return NOTHING if fraction is None else f"{100 * fraction:+.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as "8.3 s", "4 min 05 s", "2 h 07 min" or "3 d 04 h"."""
    if seconds is None:
        return NOTHING
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def moment(text: str) -> str:
    """A recorded moment as a date and a time of day: "2026-11-28T08:46:51+00:00" is "28 Nov 2026, 08:46 UTC".

    Args:
        text: in ISO 8601 with its offset; anything else is returned as it is.
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    offset = when.utcoffset()
    zone = "" if offset is None else " UTC" if offset == timedelta(0) else f" {when:%z}"
    return f"{when.day} {_MONTHS[when.month - 1]} {when:%Y, %H:%M}{zone}"


def size(byte_count: float | None) -> str:
    """Bytes in powers of ten with three significant digits: "23.4 MB" are 23,400,000 bytes."""
    if byte_count is None:
        return NOTHING
    value, units = float(byte_count), ["B", "kB", "MB", "GB", "TB"]
    while round(value) >= 1000 and len(units) > 1:
        value /= 1000
        del units[0]
    unit = units[0]
    if unit == "B" or value >= 100:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if round(value, 2) >= 10 else f"{value:.2f} {unit}"


def typeset(text: str) -> str:
    """A formatted number with minus signs instead of hyphens."""
    return text.replace("-", "\u2212")


def shorten(text: str, limit: int = 600) -> str:
    """Cut a text of more than `limit` characters and say how long it was."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters in all)"


def shorten_name(text: str, limit: int) -> str:
    """Cut the middle out of a name of more than `limit` characters: both of its ends tell it from others."""
    if len(text) <= limit:
        return text
    front = (limit - 1) // 2
    return f"{text[:front]}…{text[front + 1 - limit :]}"
