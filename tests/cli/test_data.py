"""``fpo data check``: what it says of files and recipes, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_recipe

USER = {"role": "user", "content": "How many legs has a spider?"}
PAIR = {"prompt": "How many legs has a spider?", "chosen": "Eight.", "rejected": "Many."}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path) -> tuple[str, ...]:
    save_recipe(tmp_path / "r")
    return ("--model", str(tmp_path / "r" / "model"))


def test_a_file_is_told_by_columns_drops_lengths_and_examples(fpo, model, tmp_path):
    parted = {
        "chosen": [USER, answer("Eight."), {"role": "user", "content": "Sure?"}, answer("Yes.")],
        "rejected": [USER, answer("Six.")],
        "id": 7,
    }
    path = write(tmp_path / "d.jsonl", [PAIR, parted, {**PAIR, "rejected": ""}])
    done = fpo("data", "check", path, *model)
    assert done.code == 0
    assert "data: 2 train examples, 1 dropped" in done.out
    assert "1 read from  prompt, chosen, rejected" in done.out
    assert "not used    id (1)" in done.out
    assert "a response is empty" in done.out
    assert "line 3" in done.out
    assert "mean tokens: prompt" in done.out
    # The user's turn inside a side stands outside the marks of scored tokens.
    assert "⟦Eight.<|im_end|>⟧" in done.out
    assert "⟦Yes.<|im_end|>⟧" in done.out
    assert "⟦Sure?" not in done.out


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_limits_show_the_lengths_before_and_after(fpo, model, tmp_path):
    rows = [{**PAIR, "prompt": f"{n}? " + "fox " * n} for n in range(40)]
    path = write(tmp_path / "d.jsonl", rows)
    limit = ("--set", "data.max_length=40", "--json")

    def lengths(*more: str) -> tuple[dict, dict]:
        done = fpo("data", "check", path, *model, *limit, *more)
        (found,) = json.loads(done.out)
        return found["stats"]["lengths"]["before"], found["stats"]["lengths"]["after"]

    before, dropped = lengths()
    assert before["examples"] == 40
    assert dropped["examples"] < 40
    assert dropped["mean_prompt"] < before["mean_prompt"]
    whole, cut = lengths("--set", "data.truncation=keep_end")
    assert whole == before
    assert cut["examples"] > dropped["examples"]


def test_what_stops_a_run_is_told_and_ends_with_1(fpo, model, tmp_path):
    kto = [{"prompt": "q", "completion": "a", "label": True}]
    done = fpo("data", "check", write(tmp_path / "k.jsonl", kto), *model)
    assert done.code == 1
    assert "A run would stop: no example of the train split is left" in done.out
    assert "the row judges one answer (KTO)" in " ".join(done.out.split())
    missing = fpo("data", "check", tmp_path / "nothing.jsonl", *model)
    assert missing.code == 1
    assert "does not exist" in missing.err
    assert "Traceback" not in missing.err + done.err


def test_dialogues_and_recipes_are_checked_too(fpo, model, tmp_path):
    chat = [{"messages": [USER, answer("Eight.")]}]
    done = fpo("data", "check", write(tmp_path / "c.jsonl", chat), *model, "--as", "dialogues")
    assert done.code == 0
    assert "sft: 1 train examples" in done.out
    whole = fpo("data", "check", tmp_path / "r" / "tiny.yaml", "--show", "0")
    assert whole.code == 0
    assert "data: 12 train, 6 heldout examples" in whole.out
    wrong = fpo("data", "check", tmp_path / "r" / "tiny.yaml", "--as", "dialogues")
    assert wrong.code == 2


def test_control_characters_of_the_data_reach_no_terminal(fpo, model, tmp_path):
    rows = [{**PAIR, "chosen": "\x1b[2JEight.", "\x1b]0;x\x07": 1}]
    done = fpo("data", "check", write(tmp_path / "d.jsonl", rows), *model)
    assert "\x1b[2J" not in done.out
    assert "\x1b]0;" not in done.out
    assert "⟨U+001B⟩" in done.out


def test_a_plan_says_what_the_sources_are_read_as(fpo, tmp_path):
    recipe = save_recipe(tmp_path / "r")
    rows = [{**PAIR, "prompt": f"{n}?", "note": "x"} for n in range(4)]
    data = f"data.train=[{write(tmp_path / 'd.jsonl', rows)}]"
    done = fpo("plan", recipe, "--set", data, "--store", tmp_path / "store")
    assert "d.jsonl: 4 rows, read as prompt, chosen, rejected, not used: note" in done.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_locale_that_lacks_characters_ends_nothing(model, tmp_path, encoding):
    path = write(tmp_path / "d.jsonl", [{**PAIR, "chosen": "日本, é, 🙂"}])
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "cli.main", "data", "check", str(path), *model]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"1 train examples" in done.stdout


def test_the_command_tells_its_version(fpo):
    done = fpo("--version")
    assert done.code == 0
    assert done.out.startswith("fpo-pipeline ")


def test_a_file_has_none_of_the_settings_of_another_recipe(fpo, model, tmp_path):
    """What a folder holds is told under its name, too."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "d.jsonl", [{**PAIR, "topic": "animals"}])
    done = fpo("data", "check", f"{folder}/", *model)
    assert "not used    topic (1)" in done.out
    assert "train  pairs  1 row" in done.out
