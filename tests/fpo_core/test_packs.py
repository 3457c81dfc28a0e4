"""Packs: what is read, what is refused and in which words."""

import hashlib
import json

import pytest
import yaml

from fpo_core.bench.pack import PACK_FILE, load_pack, packs_folder
from fpo_core.bench.pull import KNOWN_PACKS
from fpo_core.errors import FPOError
from tests.fpo_core.packs import arena_folder, mt_bench_folder, real_pack, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def arena(tmp_path):
    return arena_folder(tmp_path / "arena")


@pytest.fixture
def mt_bench(tmp_path):
    return mt_bench_folder(tmp_path / "mt")


def settle(folder, **changed):
    """Give a folder of the arena layout a pack.yaml."""
    settings = {
        "name": "mine", "kind": "arena_hard",
        "files": {"questions": "question.jsonl", "baseline": "gpt-4-0314.jsonl"}, **changed,
    }  # fmt: skip
    (folder / PACK_FILE).write_text(yaml.safe_dump(settings))


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("folder", "kind", "roles"),
    [
        ("arena_hard", "arena_hard", ["baseline", "questions"]),
        ("mt_bench", "mt_bench", ["judge", "questions", "references"]),
        ("alpaca_eval", "alpaca_eval", ["baseline", "questions"]),
        ("ifeval", "ifeval", ["questions"]),
    ],
)
def test_the_originals_are_taken_as_they_are(folder, kind, roles):
    pack = load_pack(real_pack(folder))
    assert (pack.kind, sorted(pack.files)) == (kind, roles)


def test_the_table_pins_what_the_originals_hold():
    """Every real file here is one of the table's, by content; three of the table's are not here."""
    here = {
        hashlib.sha256(file.read_bytes()).hexdigest()
        for name in ("arena_hard", "mt_bench", "alpaca_eval", "ifeval")
        for file in real_pack(name).iterdir()
    }
    pinned = {file.sha256 for pack in KNOWN_PACKS.values() for file in pack.files.values()}
    assert here < pinned
    assert len(pinned - here - {None}) == 3


def test_known_packs_come_by_https_from_fixed_commits():
    for pack in KNOWN_PACKS.values():
        for file in pack.files.values():
            assert file.url.startswith("https://")
            fixed = any(len(part) == 40 for part in file.url.split("/"))
            assert fixed or (file.sha256 is None and "not pinned" in pack.notes)


def test_a_checkout_of_the_authors_repositories(tmp_path):
    arena = arena_folder(tmp_path / "made")
    data = tmp_path / "arena-hard-auto" / "data" / "arena-hard-v0.1"
    (data / "model_answer").mkdir(parents=True)
    (tmp_path / "arena-hard-auto" / "config").mkdir()
    (arena / "question.jsonl").rename(data / "question.jsonl")
    (arena / "gpt-4-0314.jsonl").rename(data / "model_answer" / "gpt-4-0314.jsonl")
    (arena / "judge_config.yaml").rename(tmp_path / "arena-hard-auto/config/judge_config.yaml")
    assert set(load_pack(tmp_path / "arena-hard-auto").files) == {"questions", "baseline", "judge"}
    mt = mt_bench_folder(tmp_path / "mt")
    data = tmp_path / "FastChat" / "fastchat" / "llm_judge" / "data"
    (data / "mt_bench" / "reference_answer").mkdir(parents=True)
    (mt / "question.jsonl").rename(data / "mt_bench" / "question.jsonl")
    (mt / "reference_answer_gpt-4.jsonl").rename(data / "mt_bench/reference_answer/gpt-4.jsonl")
    (mt / "judge_prompts.jsonl").rename(data / "judge_prompts.jsonl")
    assert load_pack(tmp_path / "FastChat").kind == "mt_bench"


def test_the_older_rows_of_arena_hard_are_the_same_questions(tmp_path, arena):
    from fpo_core.bench.arena_hard import ArenaHard

    older = tmp_path / "older"
    write_rows(older / "question.jsonl", [
        {"question_id": row["uid"], "category": row["category"],
         "turns": [{"content": row["prompt"]}]}
        for row in rows_of(arena / "question.jsonl")
    ])  # fmt: skip
    write_rows(older / "gpt-4-0314.jsonl", [
        {"question_id": row["uid"], "model_id": "base",
         "choices": [{"turns": [{"content": row["messages"][1]["content"]["answer"]}]}]}
        for row in rows_of(arena / "gpt-4-0314.jsonl")
    ])  # fmt: skip
    old, new = load_pack(older), load_pack(arena)
    rules = ArenaHard()
    assert rules.questions(old) == rules.questions(new)
    assert rules.baseline(old) == rules.baseline(new)


def test_the_digest_follows_contents_and_roles(arena):
    settle(arena)
    first = load_pack(arena).digest
    settle(arena, name="another", notes="a note changes nothing")
    assert load_pack(arena).digest == first
    settle(arena, files={"questions": "question.jsonl"})
    assert load_pack(arena).digest != first
    settle(arena)
    rows = rows_of(arena / "question.jsonl")
    write_rows(arena / "question.jsonl", [{**rows[0], "prompt": "another"}, *rows[1:]])
    assert load_pack(arena).digest != first


def test_a_pinned_sha256_that_differs(arena):
    settle(arena, files={"questions": {"path": "question.jsonl", "sha256": "0" * 64}})
    with pytest.raises(FPOError, match=r"question\.jsonl: its sha256 is [0-9a-f]{64}, pack\.yaml"):
        load_pack(arena)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"colour": "red"}, "unknown key 'colour'.*Its keys are name, kind, files, licence, notes"),
        ({"kind": "arena"}, "kind: .*'arena_hard'"),
        ({"name": "../up"}, "name: "),
        ({"files": {"questions": {"path": "question.jsonl", "md5": "1"}}}, "unknown key 'files"),
        ({"files": {"questions": {"path": "question.jsonl", "url": "file:///a"}}}, "url: "),
        ({"files": {"baseline": "gpt-4-0314.jsonl"}}, "no file 'questions'; a pack of kind"),
        ({"files": {"questions": "question.jsonl", "basline": "x"}}, "unknown role 'basline'"),
        ({"files": {"questions": "../mt/question.jsonl"}}, "not in the pack's folder"),
        ({"files": {"questions": "/etc/hostname"}}, "not in the pack's folder"),
        ({"files": {"questions": "link.jsonl"}}, "not in the pack's folder"),
        ({"files": {"questions": "none.jsonl"}}, "none.jsonl: the pack's questions, and not there"),
    ],
)
def test_a_pack_file_that_is_wrong(arena, tmp_path, changed, said):
    outside = tmp_path / "outside.jsonl"
    outside.write_text("secret")
    (arena / "link.jsonl").symlink_to(outside)
    settle(arena, **changed)
    with pytest.raises(FPOError, match=said) as caught:
        load_pack(arena)
    assert str(arena) in str(caught.value)


def test_a_pack_file_that_is_no_yaml(arena):
    (arena / PACK_FILE).write_text("name: [")
    with pytest.raises(FPOError, match=r"pack\.yaml: not YAML"):
        load_pack(arena)
    (arena / PACK_FILE).write_text("- a list")
    with pytest.raises(FPOError, match="holds list, not a mapping"):
        load_pack(arena)


@pytest.mark.parametrize(
    ("file", "line", "changed", "said"),
    [
        ("question.jsonl", 2, {"prompt": None}, "line 2: prompt is None, not text"),
        ("question.jsonl", 2, {"uid": "id0"}, "line 2: the id 'id0' is that of .*line 1, too"),
        ("question.jsonl", 3, {"uid": ""}, "line 3: uid is ''; an id is text"),
        ("question.jsonl", 3, {"uid": True}, "line 3: uid is True"),
        ("gpt-4-0314.jsonl", 1, {"messages": []}, "line 1: no messages.-1.content; the columns"),
        ("gpt-4-0314.jsonl", 4, {"uid": "other"}, r"nothing for 1 of 4 questions \('id0'\); 1 for"),
    ],
)
def test_rows_that_are_wrong(arena, file, line, changed, said):
    rows = rows_of(arena / file)
    rows[line - 1] |= changed
    write_rows(arena / file, rows)
    with pytest.raises(FPOError, match=said) as caught:
        load_pack(arena)
    assert file in str(caught.value)


def test_ids_that_differ_are_listed_a_few(arena):
    write_rows(arena / "gpt-4-0314.jsonl", rows_of(arena / "gpt-4-0314.jsonl")[:0] + [
        {"uid": f"x{number}", "model": "m", "messages": [{"content": "a"}]} for number in range(9)
    ])  # fmt: skip
    with pytest.raises(FPOError, match=r"nothing for 4 of 4 questions \(.*, \.\.\.\); 9 for no"):
        load_pack(arena)


def test_a_column_that_is_missing_and_json_that_is_broken(arena):
    rows = rows_of(arena / "question.jsonl")
    del rows[1]["prompt"]
    write_rows(arena / "question.jsonl", rows)
    with pytest.raises(FPOError, match="line 2: no prompt; the columns are uid, category"):
        load_pack(arena)
    with (arena / "question.jsonl").open("a") as stream:
        stream.write('{"uid": \n')
    (arena / "question.jsonl").write_text((arena / "question.jsonl").read_text().splitlines()[4])
    with pytest.raises(FPOError, match="line 1: not JSON"):
        load_pack(arena)


def test_references_have_to_be_there_where_the_category_has_them(mt_bench):
    write_rows(mt_bench / "reference_answer_gpt-4.jsonl", [
        {"question_id": 81, "choices": [{"turns": ["a", "b"]}]}
    ])  # fmt: skip
    with pytest.raises(FPOError, match=r"gpt-4\.jsonl: nothing for 1 of 1 questions \('82'\)"):
        load_pack(mt_bench)
    (mt_bench / PACK_FILE).write_text(
        yaml.safe_dump({"name": "m", "kind": "mt_bench", "files": {"questions": "question.jsonl"}})
    )
    with pytest.raises(FPOError, match="1 questions need a reference answer"):
        load_pack(mt_bench)


def test_mt_bench_has_two_turns(mt_bench):
    rows = rows_of(mt_bench / "question.jsonl")
    rows[1]["turns"] = ["one"]
    write_rows(mt_bench / "question.jsonl", rows)
    with pytest.raises(FPOError, match="line 2: turns has 1 turns, MT-Bench has two"):
        load_pack(mt_bench)


def test_judges_prompts_are_checked_when_the_pack_is_read(mt_bench, arena):
    rows = rows_of(mt_bench / "judge_prompts.jsonl")
    rows[1]["prompt_template"] = "Rate {answer} to {question} {quality}"
    write_rows(mt_bench / "judge_prompts.jsonl", rows)
    said = r"line 2: prompt_template: lacks \{ref_answer_1\}, has \{quality\}, which is unknown"
    with pytest.raises(FPOError, match=said):
        load_pack(mt_bench)
    write_rows(mt_bench / "judge_prompts.jsonl", rows[:1])
    with pytest.raises(FPOError, match="no prompt named single-math-v1, single-v1-multi-turn"):
        load_pack(mt_bench)
    judge = yaml.safe_load((arena / "judge_config.yaml").read_text())
    for changed, words in (
        ({"regex_pattern": "(.*)"}, "regex_pattern is '(.*)'; Arena-Hard's verdicts are"),
        ({"prompt_template": ["{question_1} {answer_1}"]}, "lacks {answer_2}"),
        ({"prompt_template": ["{question_1.__class__} {answer_1} {answer_2}"]}, "which is unknown"),
        ({"prompt_template": ["{question_1!r} {answer_1} {answer_2}"]}, "a name in braces"),
        ({"prompt_template": ["{question_1"]}, "not a template"),
        ({"system_prompt": 3}, "system_prompt: "),
        ({"max_tokens": 0}, "max_tokens: "),
    ):
        (arena / "judge_config.yaml").write_text(yaml.safe_dump({**judge, **changed}))
        with pytest.raises(FPOError) as caught:
            load_pack(arena)
        assert words in str(caught.value)


def test_a_folder_that_is_no_pack(tmp_path, arena, mt_bench):
    with pytest.raises(FPOError, match="no such folder"):
        load_pack(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FPOError, match=r"no pack\.yaml, and not the files of an original"):
        load_pack(empty)
    (arena / "gpt-4-0314.jsonl").unlink()
    with pytest.raises(FPOError, match=r"arena_hard lacks gpt-4-0314\.jsonl; mt_bench lacks refe"):
        load_pack(arena)
    (mt_bench / "input_data.jsonl").write_text("{}")
    with pytest.raises(FPOError, match="has the files of ifeval and mt_bench"):
        load_pack(mt_bench)


def test_ifeval_rows_have_arguments_for_each_instruction(tmp_path):
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["a:b", "c:d"], "kwargs": [{}, {}]}
    write_rows(tmp_path / "if" / "input_data.jsonl", [row])
    assert load_pack(tmp_path / "if").kind == "ifeval"
    write_rows(tmp_path / "if" / "input_data.jsonl", [row, {**row, "key": 2, "kwargs": [{}]}])
    with pytest.raises(FPOError, match="line 2: 2 instructions in instruction_id_list, 1 entries"):
        load_pack(tmp_path / "if")


def test_a_name_is_looked_up_among_pulled_packs(arena):
    with pytest.raises(FPOError, match=r"'mine' was not pulled: `fpo bench pull mine`.*\./mine"):
        load_pack("mine")
    settle(arena)
    packs_folder().mkdir(parents=True)
    arena.rename(packs_folder() / "mine")
    assert load_pack("mine").name == "mine"
    (packs_folder() / "mine" / PACK_FILE).unlink()
    with pytest.raises(FPOError, match="was not pulled completely"):
        load_pack("mine")
