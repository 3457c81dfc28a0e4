"""Numbers as people read them."""

import math

import pytest

from fpo_core.report.human import count, decimals_for, duration, number, percent, size


def plain(text: str) -> str:
    return text.replace("\u202f", " ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"),
        (269_060_552, "269 MB"), (999_600, "1.0 MB"), (5_200_000_000, "5.2 GB"),
    ],
)  # fmt: skip
def test_size(value: int, text: str) -> None:
    assert plain(size(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"),
        (192, "3 min 12 s"), (3600, "1 h"), (3725, "1 h 2 min"), (90_000, "1 d 1 h"),
        (math.nan, "not measured"),
    ],
)  # fmt: skip
def test_duration(value: float, text: str) -> None:
    assert plain(duration(value)) == text


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "text"),
    [
        (0.6934, None, False, "0.693"), (12_345.6, 0, False, "12,346"), (-0.5, 2, False, "−0.50"),
        (0.5, 1, True, "+0.5"), (-0.0004, 1, True, "0.0"), (1e-5, None, False, "1.0 × 10⁻⁵"),
        (-2.5e9, None, False, "−2.5 × 10⁹"), (0, 3, True, "0.000"),
        (math.nan, None, False, "not measured"), (math.inf, 2, True, "not measured"),
    ],
)  # fmt: skip
def test_number(value: float, decimals: int | None, sign: bool, text: str) -> None:
    assert plain(number(value, decimals, sign=sign)) == text


def test_percent_and_count() -> None:
    assert plain(percent(0.6434)) == "64.3 %"
    assert plain(percent(0.6434, 0)) == "64 %"
    assert percent(math.nan) == "not measured"
    assert count(1_234_567) == "1,234,567"
    assert count(None) == "–"


def test_decimals_show_two_digits_of_a_spread() -> None:
    assert [decimals_for(spread) for spread in (250, 2.5, 0.25, 0.0025)] == [0, 1, 2, 4]
    assert decimals_for(0.0) == decimals_for(math.nan) == 3
