"""Benchmark scores put into tables: only scores with equal keys share one.

A score's key holds all that it depends on beside the policy: benchmark and pack, judge and its
revision, template, baseline, decoding. The same answers scored by another judge are other numbers,
so scores whose keys differ are never in one table, and each cell says how many verdicts it rests
on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from fpo_core.errors import FPOError
from fpo_core.report.comparison import ScoreCell, ScoreRow, ScoreTable

Record = Mapping[str, Any]  # of `scores.json`: key, benchmark, opponent, temperature, scores
FIELDS = ("key", "benchmark", "opponent", "temperature", "scores")
SCORE_FIELDS = ("name", "label", "unit", "value", "low", "high", "judged", "asked")
RATES_SCHEMA = {
    "benchmark": pl.String, "opponent": pl.String, "key": pl.String, "score": pl.String,
    "run": pl.String, "temperature": pl.Float64, "value": pl.Float64, "low": pl.Float64,
    "high": pl.Float64, "judged": pl.Int64, "asked": pl.Int64,
}  # fmt: skip


def contest(benchmark: str, opponent: str | None) -> str:
    """A benchmark's name, with whom its answers were compared; models can be rated alone."""
    return benchmark if opponent is None else f"{benchmark} against {opponent}"


def score_tables(runs: Mapping[str, Sequence[Record]]) -> tuple[ScoreTable, ...]:
    """The runs' scores in as many tables as there are keys.

    Args:
        runs: each run's records, by its name, in the order of the rows.

    Raises:
        FPOError: a record that lacks a field, or two results of a run for one key.
    """
    groups: dict[str, list[tuple[str, Record]]] = {}
    for run, record in _records(runs):
        identity = [record[name] for name in ("benchmark", "opponent", "temperature", "key")]
        groups.setdefault(_canonical(identity), []).append((run, record))
    return tuple(one_table(group) for group in groups.values())


def one_table(records: Sequence[tuple[str, Record]]) -> ScoreTable:
    """A table of these records, by the names of their runs.

    Raises:
        FPOError: their keys differ; the entries that do are named. Or a run has two results.
    """
    first = records[0][1]
    for _, record in records[1:]:
        apart = differing_entries(_identity(first), _identity(record))
        if apart:
            raise FPOError(
                f"scores of {first['benchmark']} with different keys cannot be in one table; they "
                f"differ in {', '.join(apart)}"
            )
    columns: dict[str, tuple[str, str]] = {}
    rows: dict[str, dict[str, ScoreCell]] = {}
    for run, record in records:
        cells = {score["name"]: _cell(run, score) for score in record["scores"]}
        columns |= {score["name"]: (score["label"], score["unit"]) for score in record["scores"]}
        if rows.setdefault(run, cells) != cells:
            raise FPOError(
                f"run {run} has two results of "
                f"{contest(record['benchmark'], record['opponent'])} with one key; one of them is "
                f"not what its key says"
            )
    return ScoreTable(
        first["benchmark"], first["opponent"], first["temperature"], dict(first["key"]), columns,
        tuple(ScoreRow(run, cells) for run, cells in rows.items()),
    )  # fmt: skip


def why_apart(tables: Sequence[ScoreTable]) -> tuple[str, ...]:
    """A sentence for each benchmark and opponent that has several tables."""
    found = []
    groups: dict[tuple[str, str | None], list[ScoreTable]] = {}
    for table in tables:
        groups.setdefault((table.benchmark, table.opponent), []).append(table)
    for (benchmark, opponent), members in groups.items():
        entries: dict[str, None] = {}
        for other in members[1:]:
            one, two = ({**t.key, "temperature": t.temperature} for t in (members[0], other))
            entries |= dict.fromkeys(differing_entries(one, two))
        if len(members) > 1:
            found.append(
                f"{contest(benchmark, opponent)} has {len(members)} tables, whose scores cannot be "
                f"compared with each other: they differ in {', '.join(entries)}."
            )
    return tuple(found)


def win_rates(runs: Mapping[str, Sequence[Record]]) -> pl.DataFrame:
    """Win rates by the temperature of the answers, of what was scored at several.

    Returns:
        A row a run, figure and temperature; ``key`` is the key without the temperature, and only
        rows with equal benchmark, opponent, key and score make one chart.
    """
    rows = [
        {
            "benchmark": record["benchmark"], "opponent": record["opponent"],
            "key": _canonical(_without_temperature(record["key"])), "score": score["label"],
            "run": run, "temperature": float(record["temperature"]),
            **{name: score[name] for name in ("value", "low", "high", "judged", "asked")},
        }
        for run, record in _records(runs)
        for score in record["scores"]
        if "win_rate" in score["name"] and record["temperature"] is not None
    ]  # fmt: skip
    frame = pl.DataFrame(rows, schema=RATES_SCHEMA)
    chart = ["benchmark", "opponent", "key", "score"]
    several = pl.col("temperature").n_unique().over(chart) > 1
    return frame.filter(several).unique(maintain_order=True).sort(
        "temperature", maintain_order=True
    )  # fmt: skip


def differing_entries(one: Mapping[str, Any], two: Mapping[str, Any], path: str = "") -> list[str]:
    """The entries, by their path, in which two keys differ."""
    found = []
    for name in dict.fromkeys((*one, *two)):
        here, there = one.get(name), two.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            found += differing_entries(here, there, f"{path}{name}.")
        elif _canonical(here) != _canonical(there) or (name in one) != (name in two):
            found.append(f"{path}{name}")
    return found


def _identity(record: Record) -> dict[str, Any]:
    return {**record["key"], **{name: record[name] for name in FIELDS[1:-1]}}


def _without_temperature(key: Mapping[str, Any]) -> dict[str, Any]:
    """A key without the answers' temperature; the judge's own stays."""
    rest = {name: value for name, value in key.items() if name != "temperature"}
    decoding = rest.get("decoding")
    if isinstance(decoding, dict):
        rest["decoding"] = {n: value for n, value in decoding.items() if n != "temperature"}
    return rest


def _records(runs: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, Record]]:
    for run, records in runs.items():
        for record in records:
            missing = [name for name in FIELDS if name not in record] or [
                name for score in record["scores"] for name in SCORE_FIELDS if name not in score
            ]
            if missing:
                raise FPOError(f"a score of run {run} has no {', '.join(dict.fromkeys(missing))}")
            yield run, record


def _cell(run: str, score: Mapping[str, Any]) -> ScoreCell:
    if not 0 <= score["judged"] <= score["asked"]:
        raise FPOError(
            f"score {score['name']} of run {run}: {score['judged']} judged of {score['asked']} "
            f"asked; no more can be judged than was asked"
        )
    return ScoreCell(*(score[name] for name in ("value", "low", "high", "judged", "asked")))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
