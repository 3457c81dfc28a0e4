"""Tables as LaTeX: booktabs, every character of the data escaped.

A cell with an interval reads value, then the interval as a subscript. The table stands in an
environment of its own with a caption, and needs ``\\usepackage{booktabs}`` alone.
"""

import re
import unicodedata
from collections.abc import Sequence

from fpo_core.report.comparison_tables import Table
from fpo_core.report.human import MINUS, NARROW
from fpo_core.report.view import Value

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    NARROW: r"\,", "\N{NO-BREAK SPACE}": "~", MINUS: "$-$", "×": r"$\times$", "–": "--",
    "—": "---", "…": r"\ldots{}", "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$",
    "’": "'", "‖": r"\textbardbl{}",
}  # fmt: skip
_SUPERSCRIPT = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
_PLAIN = str.maketrans(_SUPERSCRIPT, "-0123456789")
_RAISED = re.compile(f"[{_SUPERSCRIPT}]+")


def escape(text: str) -> str:
    """Text as LaTeX shows it; what neither ASCII nor a Latin letter is reads as a question mark."""
    parts, at = [], 0
    for found in _RAISED.finditer(text):
        parts.append("".join(map(_escaped, text[at : found.start()])))
        parts.append(f"$^{{{found[0].translate(_PLAIN)}}}$")
        at = found.end()
    return "".join([*parts, *map(_escaped, text[at:])])


def _escaped(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if character.isspace():
        return " "
    if character.isascii():
        return character if character.isprintable() else "?"
    latin = ord(character) < 0x180 and unicodedata.category(character).startswith("L")
    return character if latin else "?"


def cell(value: Value) -> str:
    """A cell; its interval is a subscript."""
    low, to, high = value.interval.partition(" to ")
    if not to:
        return escape(value.value)
    return rf"{escape(value.value)}$_{{[{_in_math(low)},\,{_in_math(high)}]}}$"


def _in_math(number: str) -> str:
    """A number of ours inside of a formula."""
    raised = _RAISED.sub(lambda found: f"^{{{found[0].translate(_PLAIN)}}}", number)
    for ours, theirs in ((MINUS, "-"), (NARROW, r"\,"), ("×", r"\times "), (",", "{,}")):
        raised = raised.replace(ours, theirs)
    return raised


def latex(table: Table) -> str:
    """A table as the content of a ``.tex`` file.

    Args:
        table: its name is the label, title and note are the caption.
    """
    names, values = table.names, len(table.columns) - table.names
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title)}. {escape(table.note)}}}",
        rf"\label{{tab:{table.name.replace('_', '-')}}}",
        rf"\begin{{tabular}}{{{'l' * names}{'r' * values}}}",
        r"\toprule",
        _line([escape(column) for column in table.columns]),
        r"\midrule",
        *(_line([cell(value) for value in row]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
