"""Numbers as people read them: 64.3 %, 1.2 MB, 3 min 12 s.

A narrow no-break space joins a number to its unit and a true minus sign leads a negative one, so
that columns line up and no line breaks inside a quantity.
"""

import math
import re

NARROW = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
NOT_MEASURED = "not measured"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters and lone surrogates, which HTML and SVG cannot hold; \t, \n and \r are text.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_SMALLEST_PLAIN, _LARGEST_PLAIN = 1e-4, 1e7


def decimals_for(spread: float) -> int:
    """Decimals that show two significant digits of a spread such as an interval's width."""
    if not math.isfinite(spread) or spread <= 0:
        return 3
    return min(max(1 - math.floor(math.log10(spread)), 0), 6)


def number(value: float, decimals: int | None = None, *, sign: bool = False) -> str:
    """A plain number; powers of ten only where plain digits would read as 0.

    Args:
        value: the number; one that is not finite reads "not measured".
        decimals: digits after the point; three significant digits where left out.
        sign: whether a positive number carries a plus.
    """
    if not math.isfinite(value):
        return NOT_MEASURED
    size = abs(value)
    if size and (size < _SMALLEST_PLAIN or size >= _LARGEST_PLAIN):
        mantissa, exponent = f"{size:.1e}".split("e")
        power = str(int(exponent)).translate(_SUPERSCRIPTS)
        text = f"{mantissa}{NARROW}×{NARROW}10{power}"
    else:
        if decimals is None:
            decimals = min(max(2 - math.floor(math.log10(size)), 0), 6) if size else 0
        text = f"{size:,.{decimals}f}"
    # What rounds to zero has no sign: "-0.0" says nothing.
    if value == 0 or not any(digit in text for digit in "123456789"):
        return text
    return f"{MINUS if value < 0 else '+' if sign else ''}{text}"


def percent(share: float, decimals: int = 1, *, sign: bool = False) -> str:
    """A share between 0 and 1 in percent."""
    if not math.isfinite(share):
        return NOT_MEASURED
    return f"{number(100 * share, decimals, sign=sign)}{NARROW}%"


def count(value: int | None) -> str:
    """A count with its thousands apart; a dash where there is none."""
    return "–" if value is None else f"{value:,}"


def size(num_bytes: int) -> str:
    """A file size in decimal units, as object stores bill it."""
    if num_bytes < 1000:
        return f"{num_bytes}{NARROW}B"
    amount, units = num_bytes / 1000, ["kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        del units[0]
    return f"{amount:.{1 if amount < 99.95 else 0}f}{NARROW}{units[0]}"


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    if not math.isfinite(seconds):
        return NOT_MEASURED
    if seconds < 9.95:
        return f"{seconds:.1f}{NARROW}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW}s"
    parts = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (large, name), (small, next_name) in zip(parts, parts[1:], strict=False):
        if whole >= large:
            rest = whole % large // small
            tail = f" {rest}{NARROW}{next_name}" if rest else ""
            return f"{whole // large}{NARROW}{name}{tail}"
    raise AssertionError("a minute or more has a unit")


def printable(text: str) -> str:
    """Text from data with what no page and no drawing can hold replaced."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
