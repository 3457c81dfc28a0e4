"""Colours of the charts and the page, light and dark.

Charts are drawn once, in the light colours. Inline in the page their colours are presentation
attributes, which any style rule overrides: ``dark_rules`` turns each into its dark counterpart, so
one drawing follows the reader's theme. Blue and orange stay apart for all common colour blindness,
and each colour has 4.5:1 against its surface, so that it can also be text.
"""

from typing import Any, NamedTuple


class Tone(NamedTuple):
    """One role's colour on a light and on a dark page."""

    light: str
    dark: str


SURFACE = Tone("#fffffe", "#14171c")  # not #ffffff: nothing else in a drawing may match it
INK = Tone("#1f2329", "#e8eaee")
MUTED = Tone("#596069", "#a2abb6")
GRID = Tone("#e5e8ec", "#323943")
CURVE = Tone("#3d4a5f", "#c3cddb")
CHOSEN = Tone("#0b63b5", "#6cb4ff")
REJECTED = Tone("#b8480a", "#ff9d5c")
# One a run where several are compared; lines carry their names too.
RUNS = (
    CHOSEN, REJECTED, Tone("#1b7a43", "#5fd08f"), Tone("#7a3fb0", "#c39af5"),
    Tone("#b5246e", "#ff8ac2"), Tone("#7a6200", "#d9bf4a"), Tone("#0b7285", "#4cc9de"), CURVE,
)  # fmt: skip
TONES = (SURFACE, INK, MUTED, GRID, CURVE, CHOSEN, REJECTED, *RUNS[2:-1])

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH = 460


def dark_rules() -> str:
    """CSS rules that repaint a chart's drawing for a dark page."""
    return "\n".join(
        f'.chart svg [{what}="{tone.light}"] {{ {what}: {tone.dark}; }}'
        for tone in TONES
        for what in ("fill", "stroke")
    )


def chart_config() -> dict[str, Any]:
    """Vega-Lite configuration that all charts share."""
    label = {"labelColor": MUTED.light, "labelFontSize": 12, "titleColor": MUTED.light}
    return {
        # The page names each chart itself; Vega's labels would name every point.
        "aria": False,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            **label,
            "domain": False,
            "gridColor": GRID.light,
            "labelPadding": 6,
            "ticks": False,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
        },
        "title": {
            "anchor": "start",
            "color": INK.light,
            "font": FONT,
            "fontSize": 15,
            "fontWeight": 600,
            "frame": "bounds",
            "offset": 14,
            "subtitleColor": MUTED.light,
            "subtitleFont": FONT,
            "subtitleFontSize": 12,
            "subtitlePadding": 5,
        },
    }
