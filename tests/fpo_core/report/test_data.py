"""The report's data section: what was read and left out, with hostile names shown as text."""

from fpo_core.report.data import data_section
from fpo_core.report.page import render
from tests.fpo_core.report.example import example_report

HISTOGRAM = [0, 3, 4, 2, *[0] * 11]
STATS = {
    "pairs": {"train": 8, "heldout": 2},
    "dropped": {"too_long": 3, "empty": 1},
    "notes": {"several_turns": 2},
    "lengths": {
        "before": {"mean_prompt": 20.0, "mean_answer": 61.0, "histogram": HISTOGRAM},
        "after": {"mean_prompt": 12.0, "mean_answer": 40.0, "histogram": [0, 3, 3, *[0] * 12]},
    },
    "sources": [
        {
            "split": "train",
            "source": "<script>alert(1)</script>.jsonl",
            "rows": 14,
            "shapes": {"prompt, chosen, rejected": 12},
            "unused_columns": {"<b>id</b>": 12},
            "notes": {},
            "dropped": {},
            "passed_over": {"weight": 2},
        }
    ],
}


def test_the_section_counts_what_was_read_left_out_and_changed():
    found = data_section(STATS)
    assert found is not None
    assert "8 train, 2 heldout pairs. Left out: 4." in found.summary
    assert "from 61 to 40 tokens" in found.summary
    cells = [tuple(cell.value for cell in row) for row in found.left_out.rows]
    assert ("a response is empty", "left out", "1") in cells
    assert any("the source's weight" in what and rows == "2" for what, _, rows in cells)
    assert found.figure is not None


def test_artifacts_of_earlier_versions_have_no_section():
    assert data_section({"pairs": {"train": 8}, "dropped": {}, "tokens": 9}) is None


def test_the_page_shows_names_from_data_as_text(tmp_path):
    page = render(example_report(data=STATS), tmp_path).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.jsonl" in page
    assert "<script>alert" not in page
    assert "<b>id</b>" not in page
    assert (tmp_path / "charts" / "data_lengths.png").read_bytes().startswith(b"\x89PNG")
