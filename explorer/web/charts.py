"""Charts as SVG, drawn on the server; colours that both themes and colour-blind eyes can tell."""

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from explorer.features import Histogram

CHOSEN, REJECTED, INK = "#3b82c4", "#d9822b", "#808890"
_drawing = threading.Lock()  # vl-convert's engine is not for two threads


def histogram_svg(histogram: Histogram) -> str:
    """How the means of a feature are spread over chosen and over rejected responses."""
    key = (tuple(histogram.edges), tuple(histogram.chosen), tuple(histogram.rejected))
    return _histogram(*key)


@lru_cache(maxsize=256)
def _histogram(edges: tuple[float, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> str:
    import altair as alt
    import vl_convert

    records: list[dict[str, Any]] = [
        {"from": float(low), "to": float(high), "responses": int(count), "side": side}
        for side, counts in (("chosen", chosen), ("rejected", rejected))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    chart = (
        alt.Chart(alt.Data(values=records))
        .mark_bar(opacity=0.55)
        .encode(
            x=alt.X("from:Q", title="mean activation over a response", bin="binned"),
            x2="to:Q",
            y=alt.Y("responses:Q", stack=None, title="responses"),
            color=alt.Color(
                "side:N", title=None, scale=alt.Scale(domain=["chosen", "rejected"],
                                                      range=[CHOSEN, REJECTED]),
                legend=alt.Legend(orient="top"),
            ),
        )
        .properties(width=520, height=160, background="transparent")
        .configure_axis(labelColor=INK, titleColor=INK, gridOpacity=0.2, domainColor=INK,
                        tickColor=INK)
        .configure_legend(labelColor=INK)
        .configure_view(stroke=None)
    )  # fmt: skip
    with _drawing:
        return vl_convert.vegalite_to_svg(chart.to_dict())


def strength(value: float, top: float) -> int:
    """A step from 0 to 9 for a token's shade."""
    return 0 if top <= 0 or value <= 0 else int(np.clip(np.ceil(9 * value / top), 1, 9))
