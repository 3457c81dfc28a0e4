"""Packs: what is read, what is refused and in which words, and how they are pulled."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from fpo_core.bench import pull
from fpo_core.bench.pack import PACK_FILE, PackFile, PackSettings, load_pack, packs_folder
from fpo_core.bench.pull import KNOWN_PACKS, is_pulled, known_pack, pull_pack
from fpo_core.errors import FPOError, UsageError
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


@contextmanager
def serving(files):
    """A web server on loopback; yields its address and the list of paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, promised = files.get(self.path, (404, b"", 0))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body.decode())
                body = b""
            self.send_header("Content-Length", str(len(body) + promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sourced(address, contents, *, unpinned=()):
    """An Arena-Hard pack at this address."""
    names = {"questions": "question.jsonl", "baseline": "gpt-4-0314.jsonl",
             "judge": "judge_config.yaml"}  # fmt: skip
    files = {
        role: PackFile(
            path=name, url=f"{address}/{name}",
            sha256=None if role in unpinned else hashlib.sha256(contents[name]).hexdigest(),
        )
        for role, name in names.items()
    }  # fmt: skip
    return PackSettings(name="served", kind="arena_hard", files=files, licence="none")


@pytest.fixture
def contents(arena):
    return {file.name: file.read_bytes() for file in arena.iterdir()}


def test_pulling_fetches_checks_and_keeps(contents):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    files["/question.jsonl"] = (302, b"/moved", 0)
    files["/moved"] = (200, contents["question.jsonl"], 0)
    with serving(files) as (address, asked):
        known = sourced(address, contents)
        told = []
        pulled = pull_pack(known, told.append)
        assert len(pulled.fetched) == 3
        assert told == [f"fetching {address}/{name}" for name in pulled.fetched]
        assert is_pulled("served")
        assert load_pack("served") == pulled.pack
        assert {file.read_bytes() for file in pulled.pack.files.values()} == set(contents.values())
        count = len(asked)
        (packs_folder() / "served" / PACK_FILE).unlink()  # as after a pull that was interrupted
        pulled.pack.files["judge"].unlink()
        again = pull_pack(known)
        assert (again.fetched, len(again.kept)) == (("judge_config.yaml",), 2)
        assert len(asked) == count + 1


def test_what_had_no_pin_is_pinned_as_it_came(contents):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    with serving(files) as (address, _):
        known = sourced(address, contents, unpinned=("judge",))
        judge = pull_pack(known).pack.files["judge"]
        settings = yaml.safe_load((packs_folder() / "served" / PACK_FILE).read_text())
        judged = hashlib.sha256(contents["judge_config.yaml"]).hexdigest()
        assert settings["files"]["judge"]["sha256"] == judged
        judge.write_bytes(contents["judge_config.yaml"] + b"# changed\n")
        with pytest.raises(FPOError, match="its sha256 is"):
            load_pack("served")
        assert pull_pack(known).fetched == ("judge_config.yaml",)
        files["/judge_config.yaml"] = (200, b"max_tokens: 1", 0)
        judge.unlink()
        with pytest.raises(FPOError, match="what came has the sha256"):
            pull_pack(known)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"something else", 0), "what came has the sha256 .* it was thrown away"),
        ((404, b"", 0), r"could not be fetched \(HTTPError: HTTP Error 404"),
        ((200, b"part", 100), "broke off after 4 of 104 bytes"),
    ],
)
def test_a_source_that_fails(contents, answer, said):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    with serving({**files, "/gpt-4-0314.jsonl": answer}) as (address, _):
        known = sourced(address, contents)
        with pytest.raises(FPOError, match=said) as caught:
            pull_pack(known)
    folder = packs_folder() / "served"
    assert f"put it there as {folder / 'gpt-4-0314.jsonl'} by hand" in str(caught.value)
    assert [file.name for file in folder.iterdir()] == ["question.jsonl"]
    assert not is_pulled("served")
    for name, body in contents.items():  # by hand, with the server gone
        (folder / name).write_bytes(body)
    assert pull_pack(known).fetched == ()


def test_only_the_web_is_fetched_from(contents, tmp_path):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    (tmp_path / "secret").write_text("secret")
    files["/question.jsonl"] = (302, f"file://{tmp_path}/secret".encode(), 0)
    with serving(files) as (address, _), pytest.raises(FPOError, match="could not be fetched"):
        pull_pack(sourced(address, contents, unpinned=("questions",)))


def test_what_was_pulled_and_cannot_be_read_is_no_pack(contents):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    files["/judge_config.yaml"] = (200, b"<html>log in first</html>", 0)
    with (
        serving(files) as (address, _),
        pytest.raises(FPOError, match=r"judge_config\.yaml: holds str.*remove it"),
    ):
        pull_pack(sourced(address, contents, unpinned=("judge",)))
    assert not is_pulled("served")


def test_a_name_that_is_not_known():
    with pytest.raises(UsageError, match="there are alpaca-eval-1, .*mt-bench"):
        known_pack("mtbench")
    assert known_pack("mt-bench") is pull.KNOWN_PACKS["mt-bench"]
