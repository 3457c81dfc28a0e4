"""Small packs of made-up texts, and where the real ones are on a developer's machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

DATA = Path(__file__).parents[2].parent / "shared" / "data"

ARENA_JUDGE = {
    "system_prompt": "Compare the two.",
    "prompt_template": ["Q: {question_1}\nA: {answer_1}\nB: {answer_2}"],
    "regex_pattern": r"\[\[([AB<>=]+)\]\]",
    "temperature": 0,
    "max_tokens": 512,
    "judge_model": "some-model",
}
MT_PROMPTS = {
    "single-v1": "Rate {answer} to {question}",
    "single-math-v1": "Rate {answer} to {question}; right is {ref_answer_1}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} rate {answer_2}",
    "single-math-v1-multi-turn": "{question_1} ({ref_answer_1}) {answer_1} {question_2} "
    "({ref_answer_2}) rate {answer_2}",
}


def real_pack(name: str) -> Path:
    """A folder of `../shared/data`; the test is skipped where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """A row a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arena_folder(folder: Path, count: int = 4) -> Path:
    """An Arena-Hard pack in the authors' layout, with a judge's configuration."""
    ids = [f"id{number}" for number in range(count)]
    questions = [{"uid": one, "category": "made-up", "prompt": f"ask {one}"} for one in ids]
    answers = [
        {"uid": one, "model": "base", "messages": [
            {"role": "user", "content": f"ask {one}"},
            {"role": "assistant", "content": {"answer": f"base of {one}"}},
        ]}
        for one in reversed(ids)
    ]  # fmt: skip
    write_rows(folder / "question.jsonl", questions)
    write_rows(folder / "gpt-4-0314.jsonl", answers)
    (folder / "judge_config.yaml").write_text(yaml.safe_dump(ARENA_JUDGE))
    return folder


def mt_bench_folder(folder: Path, categories: tuple[str, ...] = ("writing", "math")) -> Path:
    """An MT-Bench pack in the authors' layout, a question of each category."""
    questions = [
        {"question_id": number, "category": category, "turns": [f"q{number}.1", f"q{number}.2"]}
        for number, category in enumerate(categories, start=81)
    ]
    references = [
        {"question_id": one["question_id"], "model_id": "r", "choices": [{"turns": ["r.1", "r.2"]}]}
        for one in questions
        if one["category"] in ("math", "reasoning", "coding")
    ]
    prompts = [
        {"name": name, "type": "single", "system_prompt": f"system of {name}",
         "prompt_template": template}
        for name, template in MT_PROMPTS.items()
    ]  # fmt: skip
    write_rows(folder / "question.jsonl", questions)
    write_rows(folder / "reference_answer_gpt-4.jsonl", references)
    write_rows(folder / "judge_prompts.jsonl", prompts)
    return folder
