"""IFEval against lm-eval's own entry point, on the real prompts where they are at hand."""

import functools
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fpo_core.bench.ifeval import SEED, IFEval, load_checkers
from fpo_core.bench.model import Answers
from fpo_core.bench.pack import Pack
from fpo_core.bench.punkt import NEEDED_BY, sentence_model
from fpo_core.errors import FPOError

if not all(find_spec(name) for name in ("lm_eval", "langdetect", "nltk", "immutabledict")):
    pytest.skip("the extra eval is not installed", allow_module_level=True)

DATA = Path(__file__).parents[3] / "shared/data/ifeval/input_data.jsonl"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="no IFEval data on this machine")
BENCH = IFEval()


def make_pack(folder, rows, **files):
    path = Path(folder) / "input_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Pack("ifeval", "ifeval", Path(folder), {"questions": path, **files}, "digest")


def prompt(key, *instructions):
    """A row; instructions are (name, arguments)."""
    return {
        "key": key,
        "prompt": f"Do it, {key}.",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
    }


def answer(rows, texts):
    keys = [str(row["key"]) for row in rows]
    return Answers("policy", {key: (text,) for key, text in zip(keys, texts, strict=True)})


def has_model():
    try:
        with sentence_model(Pack("ifeval", "ifeval", Path("."), {}, "")):
            return True
    except FPOError:
        return False


needs_model = pytest.mark.skipif(
    not has_model(), reason="no punkt_tab: pip install --no-deps llama-index-core carries it"
)

NO_COMMA = ("punctuation:no_comma", {})
JSON = ("detectable_format:json_format", {})
WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 3})
TITLE = ("detectable_format:title", {})


@pytest.fixture(scope="module", autouse=True)
def quick_languages():
    """Each text's language is told once; it is the same each time, as the seed is set."""
    import langdetect

    load_checkers()
    detect = langdetect.detect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(langdetect, "detect", functools.cache(detect))
        yield detect


def meeting(row):
    """An answer that is made to follow some of the row's instructions."""
    parts = ["<<A title>>", "One word after another without any mark"]
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        parts += given.get("keywords", []) + [given.get("keyword", "")] * 3
        parts += [f"* point {n}" for n in range(given.get("num_bullets", 0))]
        parts += [f"*highlighted part {n}*" for n in range(given.get("num_highlights", 0))]
        parts += [f"[place {n}]" for n in range(given.get("num_placeholders", 0))]
        if name == "detectable_content:postscript":
            parts.append(f"{given['postscript_marker']} goodbye")
        if name == "combination:repeat_prompt":
            parts.insert(0, given["prompt_to_repeat"])
        if name == "startend:end_checker":
            parts.append(given["end_phrase"])
    text = "\n\n".join(part for part in parts if part)
    if "change_case:english_lowercase" in row["instruction_id_list"]:
        text = text.lower()
    if "change_case:english_capital" in row["instruction_id_list"]:
        text = text.upper()
    return f'"{text}"' if "startend:quotation" in row["instruction_id_list"] else text


def answers_of_all_kinds(rows):
    """Empty, JSON, foreign, fenced, short, and made to follow."""
    kinds = [
        lambda _: "  \n",
        lambda _: '```json\n{"a": [1, 2]}\n```',
        lambda _: "Das ist ein Satz auf Deutsch, und noch einer dazu. Mehr gibt es nicht!",
        lambda row: "Sure, here it is:\n" + meeting(row) + "\nHope, this helps",
        meeting,
        meeting,
    ]
    return [kinds[n % len(kinds)](row) for n, row in enumerate(rows)]


def compare_with_lm_eval(folder, rows):
    """Every verdict and every mean, against process_results and the task's own aggregation."""
    texts = answers_of_all_kinds(rows)
    scored = BENCH.score(make_pack(folder, rows), answer(rows, texts), None, {}, resamples=50)
    lm_eval = load_checkers()
    expected = []
    with sentence_model(make_pack(folder, rows)) if has_model() else nullcontext():
        for row, text in zip(rows, texts, strict=True):
            random.seed(SEED)
            expected.append(lm_eval.process_results(row, [text]))
    for kind in ("strict", "loose"):
        flat = [met for result in expected for met in result[f"inst_level_{kind}_acc"]]
        assert [row[kind] for row in scored.verdicts] == flat
        assert 0.2 < np.mean(flat) < 0.8  # the answers meet some and miss some
        figures = {score.name: score for score in scored.scores}
        prompts = np.mean([result[f"prompt_level_{kind}_acc"] for result in expected])
        assert figures[f"prompt_{kind}"].value == pytest.approx(prompts)
        instructions = lm_eval.agg_inst_level_acc(
            [result[f"inst_level_{kind}_acc"] for result in expected]
        )
        assert figures[f"instruction_{kind}"].value == pytest.approx(instructions)
        assert figures[f"instruction_{kind}"].judged == len(flat)
    assert sum(row["loose"] for row in scored.verdicts) > sum(
        row["strict"] for row in scored.verdicts
    )


@needs_data
def test_verdicts_are_lm_evals(tmp_path):
    """Over all prompts that need no sentence model."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    free = [row for row in rows if not set(NEEDED_BY) & set(row["instruction_id_list"])]
    assert (len(rows), len(free)) == (541, 477)
    compare_with_lm_eval(tmp_path, free)


@needs_data
@needs_model
def test_verdicts_are_lm_evals_over_all_prompts(tmp_path):
    compare_with_lm_eval(tmp_path, [json.loads(line) for line in DATA.read_text().splitlines()])


def test_figures_by_hand(tmp_path):
    """Two prompts with three instructions; the second prompt is followed in its loose form only."""
    rows = [prompt(1, NO_COMMA, JSON), prompt(2, NO_COMMA)]
    texts = ["no comma here", "Sure, here it is:\nno comma here"]
    scored = BENCH.score(make_pack(tmp_path, rows), answer(rows, texts), None, {})
    figures = {score.name: score.value for score in scored.scores}
    assert figures == {
        "prompt_strict": 0.0,
        "prompt_loose": 0.5,
        "instruction_strict": pytest.approx(1 / 3),
        "instruction_loose": pytest.approx(2 / 3),
        "instruction_strict/detectable_format": 0.0,
        "instruction_loose/detectable_format": 0.0,
        "instruction_strict/punctuation": 0.5,
        "instruction_loose/punctuation": 1.0,
    }
    assert scored.verdicts == (
        {"question": "1", "instruction": NO_COMMA[0], "strict": True, "loose": True},
        {"question": "1", "instruction": JSON[0], "strict": False, "loose": False},
        {"question": "2", "instruction": NO_COMMA[0], "strict": False, "loose": True},
    )


def test_interval_is_a_bootstrap_over_prompts(tmp_path):
    """One instruction a prompt: the interval has the binomial's width."""
    rows = [prompt(n, NO_COMMA) for n in range(300)]
    texts = ["a, b" if n % 3 == 0 else "a b" for n in range(300)]
    scored = BENCH.score(make_pack(tmp_path, rows), answer(rows, texts), None, {}, resamples=4000)
    strict = next(score for score in scored.scores if score.name == "prompt_strict")
    assert strict.value == pytest.approx(2 / 3)
    width = (strict.high - strict.low) / (2 * 1.96)
    assert width == pytest.approx(np.sqrt(2 / 9 / 300), rel=0.08)
    again = BENCH.score(make_pack(tmp_path, rows), answer(rows, texts), None, {}, resamples=4000)
    assert again == scored


def test_limit_takes_the_first_and_joins_strictly(tmp_path):
    rows = [prompt(n, NO_COMMA) for n in range(4)]
    pack = make_pack(tmp_path, rows)
    scored = BENCH.score(pack, answer(rows[:2], ["a", "b,"]), None, {}, limit=2)
    assert [row["strict"] for row in scored.verdicts] == [True, False]
    with pytest.raises(FPOError, match=r"nothing for 2 of \d+ questions \('2', '3'\)"):
        BENCH.score(pack, answer(rows[:2], ["a", "b,"]), None, {})
    with pytest.raises(FPOError, match=r"1 for no question \('9'\)"):
        BENCH.score(pack, Answers("p", {**answer(rows, "abcd").turns, "9": ("x",)}), None, {})


def test_letters_that_are_none_are_drawn_the_same(tmp_path):
    """lm-eval puts a random letter in the place of "#"; here always the same one."""
    letter = {"let_relation": "at least", "letter": "#", "let_frequency": 1}
    rows = [prompt(n, ("keywords:letter_frequency", letter)) for n in range(12)]
    pack, answers = make_pack(tmp_path, rows), answer(rows, ["abcdefghijklm"] * 12)
    random.seed(7)
    first = BENCH.score(pack, answers, None, {}, resamples=2)
    after = random.random()  # noqa: S311 - a look at the generator
    assert len({row["strict"] for row in first.verdicts}) == 1
    random.seed(7)
    assert random.random() == after  # noqa: S311
    assert BENCH.score(pack, answers, None, {}, resamples=2) == first


def test_languages_are_told_the_same_each_time(quick_languages):
    """A text that langdetect, unseeded, takes for now one language and now another."""
    import langdetect

    detect = quick_languages  # without memory
    text = "Hola amigo no"
    seeded = {detect(text) for _ in range(12)}
    assert len(seeded) == 1
    langdetect.DetectorFactory.seed = None
    try:
        assert len({detect(text) for _ in range(40)}) > 1
    finally:
        langdetect.DetectorFactory.seed = SEED


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prompt(1, ("punctuation:no_dot", {})), r"line 1: lm-eval has no instruction 'punct"),
        (prompt(1, ("length_constraints:number_words", {"num_words": 3})),
         r"kwargs of 'length_constraints:number_words' lack relation"),
        (prompt(1, ("length_constraints:number_words", {"relation": "about", "num_words": 3})),
         "do not serve .*about is given"),
        (prompt(1, ("punctuation:no_comma", {"words": 3})), "do not serve .*words"),
        (prompt(1), "'instruction_id_list' has to be a list of names"),
        (prompt(1, NO_COMMA) | {"kwargs": []}, "'kwargs' has to be one object for each"),
        (prompt(1, NO_COMMA) | {"prompt": None}, "'prompt' has to be text"),
        (prompt(None, NO_COMMA), "'key' has to be a number or text"),
    ],
)  # fmt: skip
def test_bad_rows_are_told(tmp_path, row, message):
    pack = make_pack(tmp_path, [row])
    with pytest.raises(FPOError, match=message):
        BENCH.score(pack, Answers("p", {"1": ("text",)}), None, {})


def test_duplicate_keys_are_told(tmp_path):
    pack = make_pack(tmp_path, [prompt(1, NO_COMMA), prompt("1", NO_COMMA)])
    with pytest.raises(FPOError, match=r"line 2: key '1' is that of .*line 1, too"):
        BENCH.questions(pack)


@pytest.fixture
def no_model(monkeypatch):
    """NLTK looks nowhere, and no package carries the model."""
    import nltk.data

    from fpo_core.bench import punkt

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(punkt, "_CARRIER", ("no-such-package", "data"))


@pytest.mark.parametrize("name", NEEDED_BY)
def test_missing_sentence_model_is_told(tmp_path, no_model, name):
    """An instruction that needs it is never counted as missed."""
    first = name.startswith("length")
    given = {"relation": "at least"} | ({"num_sentences": 2} if first else {})
    if not first:
        given = {"capital_relation": "at least", "capital_frequency": 2}
    rows = [prompt(1, NO_COMMA), prompt(2, (name, given))]
    pack = make_pack(tmp_path, rows)
    with pytest.raises(FPOError, match=r"punkt_tab.zip at .*nltk_data/tokenizers/punkt_tab.zip"):
        BENCH.score(pack, answer(rows, ["a", "B C. D"]), None, {})
    # Where no prompt wants it, it is not asked for.
    BENCH.score(pack, answer(rows, ["a", "B C. D"]), None, {}, limit=1)


def test_other_sentence_model_is_told(tmp_path, no_model):
    path = tmp_path / "nltk_data/tokenizers/punkt_tab.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("punkt_tab/english/", "")
        for name in ("abbrev_types", "sent_starters"):
            archive.writestr(f"punkt_tab/english/{name}.txt", "mr\n")
        for name in ("collocations", "ortho_context"):
            archive.writestr(f"punkt_tab/english/{name}.tab", "")
    pack = make_pack(tmp_path, [prompt(1, NO_COMMA)], punkt_tab=path)
    with (
        pytest.raises(FPOError, match="not the sentence model punkt_tab"),
        sentence_model(pack),
    ):
        pass
    wrong = make_pack(tmp_path, [prompt(1, NO_COMMA)], punkt_tab=tmp_path / "punkt_tab.zip")
    with pytest.raises(FPOError, match="move it there"), sentence_model(wrong):
        pass


@needs_model
def test_sentence_model_of_the_pack(tmp_path, monkeypatch):
    """The file of the pack is enough: NLTK needs no folder of its own, and keeps its list."""
    import nltk.data

    from fpo_core.bench import punkt

    with sentence_model(Pack("ifeval", "ifeval", tmp_path, {}, "")):
        folder = Path(str(nltk.data.find("tokenizers/punkt_tab/english/")))
    if not folder.is_dir():
        pytest.skip("the model at hand is an archive")
    path = tmp_path / "nltk_data/tokenizers/punkt_tab.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("punkt_tab/english/", "")
        for file in folder.iterdir():
            archive.writestr(f"punkt_tab/english/{file.name}", file.read_bytes())
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(punkt, "_CARRIER", ("no-such-package", "data"))
    pack = make_pack(tmp_path, [prompt(1, NO_COMMA)], punkt_tab=path)
    with sentence_model(pack):
        assert nltk.data.path == [str(tmp_path / "nltk_data")]
        tokens = nltk.sent_tokenize("Mr. Smith came. He went.")
    assert tokens == ["Mr. Smith came.", "He went."]
    assert nltk.data.path == []


IMPORT = """
import os, sys
import nltk
def download(*_, **__):
    raise AssertionError("download")
nltk.download = download
nltk.data.path[:] = []
from fpo_core.bench.ifeval import IFEval, load_checkers
assert "lm_eval" not in sys.modules
load_checkers()
assert os.environ["LOCAL_RANK"] == "0"
"""


@pytest.mark.slow
def test_import_downloads_and_prints_nothing():
    """On local rank 0, where lm-eval would."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        capture_output=True, text=True, env=os.environ | {"LOCAL_RANK": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_template_digest_is_of_checkers_and_versions(tmp_path, monkeypatch):
    """Another release of a library that verdicts depend on is another template."""
    pack = make_pack(tmp_path, [prompt(1, NO_COMMA)])
    digest = BENCH.template_digest(pack)
    assert digest == BENCH.template_digest(pack)
    versions = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions(name) + "x" * (name == "nltk")
    )
    assert BENCH.template_digest(pack) != digest


def test_nothing_is_asked_of_a_judge(tmp_path):
    rows = [prompt(1, NO_COMMA)]
    pack = make_pack(tmp_path, rows)
    assert BENCH.requests(pack, answer(rows, ["a"]), None) == []
    assert BENCH.baseline(pack) is None
