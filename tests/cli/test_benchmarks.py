"""Benchmarks in a run: the policy answers, a judge on loopback compares, scores are stored."""

import html
import json
import shutil

import polars as pl
import pytest
import yaml

from fpo_core.bench.arena_hard import ArenaHard
from fpo_core.bench.pack import load_pack
from storage.catalog import list_artifacts
from storage.location import open_store
from tests.fpo_core.packs import arena_folder, mt_bench_folder, write_rows
from tests.judge_server import fail, judging, say

pytestmark = pytest.mark.slow
QUESTIONS = 5


def ifeval_folder(folder):
    """Three prompts with an instruction each, in the authors' layout."""
    instructions = ("punctuation:no_comma", "change_case:english_lowercase", "startend:quotation")
    rows = [
        {"key": 1000 + n, "prompt": f"say it {n}", "instruction_id_list": [one], "kwargs": [{}]}
        for n, one in enumerate(instructions)
    ]
    write_rows(folder / "input_data.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    arena_folder(folder / "arena", QUESTIONS)
    ifeval_folder(folder / "ifeval")
    return folder


@pytest.fixture
def bench(fpo, finished_run, packs, tmp_path):
    """``fpo run`` on a copy of the finished store, with two benchmarks and some settings."""
    shutil.copytree(finished_run.store, tmp_path / "store")
    recipe = tmp_path / "bench.yaml"

    def run(*more, judge=None, against=("baseline", "reference")):
        values = json.loads(finished_run.recipe.read_text())
        values["benchmarks"] = [
            {"pack": str(packs / "arena"), "against": list(against), "limit": 4},
            {"pack": str(packs / "ifeval")},
        ]
        values["generation"] = {"max_new_tokens": 6, "temperatures": [0.0, 0.7]}
        if judge:
            values["judge"] = {"model": "m", "base_url": judge.url, "key_env": None, "retries": 0}
        recipe.write_text(yaml.safe_dump(values))
        return fpo("run", recipe, "--store", tmp_path / "store",
                   "--report", tmp_path / "report", *more)  # fmt: skip

    return run


def artifacts(folder, stage):
    store = open_store(folder)
    return [
        store.artifact(stage, info.version)
        for info in list_artifacts(store)
        if info.stage == stage and info.state == "complete"
    ]


def test_without_a_judge_answers_are_made_and_what_needs_none_is_scored(bench, tmp_path):
    done = bench()
    assert done.code == 0, done.err
    assert "arena-hard-v0.1: no judge is configured" in done.err
    answers = artifacts(tmp_path / "store", "answers")
    assert len(answers) == 3  # the policy's and the reference's to arena, the policy's to ifeval
    rows = pl.concat([one.scan().collect() for one in answers])
    assert sorted(rows["temperature"].unique()) == [0.0, 0.7]
    (scores,) = artifacts(tmp_path / "store", "scores")
    records = json.loads(scores.path("scores.json").read_text())
    assert [record["temperature"] for record in records] == [0.0, 0.7]
    names = {score["name"] for score in records[0]["scores"]}
    assert {"prompt_strict", "instruction_loose"} <= names
    assert len(pl.read_parquet(scores.path("verdicts.parquet"))) >= 6


def test_a_judge_compares_with_baseline_and_reference_and_is_asked_nothing_twice(
    bench, packs, tmp_path
):  # fmt: skip
    broken = 3

    def breaks_down(asked):
        return say("[[A>B]]") if len(server.asked) <= broken else fail(500)

    with judging(breaks_down) as server:
        stopped = bench(judge=server)
        assert stopped.code == 1
        assert "What it answered is kept" in stopped.err or "judge" in stopped.err
    answered = [asked.text for asked in server.asked[:broken]]
    with judging(lambda _: say("I think [[B>>A]]")) as server:
        done = bench(judge=server)
        assert done.code == 0, done.err
        assert not set(answered) & {asked.text for asked in server.asked}
        # Four questions in both orders, against two opponents, at two temperatures; equal answers
        # are asked once.
        asked = len(server.asked)
        assert 16 < asked + broken <= 32
        again = bench("--only", "benchmark@arena-hard-v0.1", "--force", judge=server)
        assert again.code == 0, again.err
        assert len(server.asked) == asked
    arena = next(
        one for one in artifacts(tmp_path / "store", "scores")
        if json.loads(one.path("scores.json").read_text())[0]["benchmark"] == "arena-hard-v0.1"
    )  # fmt: skip
    records = json.loads(arena.path("scores.json").read_text())
    places = [(record["temperature"], record["key"]["opponent"]) for record in records]
    assert len(set(places)) == 4
    for record in records:
        assert record["key"]["judge"] == {"model": "m", "revision": None}
        assert record["key"]["template"] == ArenaHard().template_digest(load_pack(packs / "arena"))
        assert record["key"]["chat_template"] == "model"
        (rate,) = (score for score in record["scores"] if score["name"] == "win_rate")
        assert (rate["judged"], rate["asked"]) == (8, 8)
    assert server.url not in arena.path("scores.json").read_text()


def test_the_cost_is_told_before_and_after_the_answers_and_nothing_is_asked(bench, tmp_path):
    with judging(lambda _: say("Both are fine.")) as server:
        price = ("--set", "judge.price={prompt: 10, reply: 30}")
        before = bench("--estimate-cost", *price, judge=server)
        assert before.code == 0, before.err
        assert "longest" in before.out
        # 4 questions, 2 orders, 2 opponents, 2 temperatures, and 512 tokens a reply.
        assert "32" in before.out
        assert f"{32 * 512:,}" in before.out
        assert server.asked == []
        assert not artifacts(tmp_path / "store", "answers")
        assert bench(judge=server).code == 0
        asked = len(server.asked)
        after = bench("--estimate-cost", *price, judge=server)
        assert "stored" in after.out
        assert "0.00" in after.out
        assert len(server.asked) == asked
    notes = [
        note
        for one in artifacts(tmp_path / "store", "scores")
        for record in json.loads(one.path("scores.json").read_text())
        if record["key"]["judge"]
        for note in record["notes"]
    ]
    assert len(notes) == 4  # two opponents at two temperatures, and no verdict of this judge
    assert all("Of 8 verdicts 0 could be read: this judge is weak" in note for note in notes)
    assert "this judge is weak" in (tmp_path / "report" / "report.html").read_text()


def test_what_the_endpoint_refuses_is_counted_and_said_and_the_rest_is_scored(bench, tmp_path):
    """A filter or a text too long: asking again would refuse again, and never end."""

    def script(asked):
        if asked.text.startswith("Q: ask id1\nA: base"):
            return fail(400, "content_policy")
        if asked.text.startswith("Q: ask id2") and "temperature" in asked.body:
            return fail(400, code="unsupported_value", param="temperature")
        return say("[[A=B]]")

    with judging(script) as server:
        done = bench("--set", "generation.temperatures=[0.0]", judge=server, against=["baseline"])
    assert done.code == 0, done.err
    record = next(
        record
        for one in artifacts(tmp_path / "store", "scores")
        for record in json.loads(one.path("scores.json").read_text())
        if record["kind"] == "arena_hard"
    )
    assert [record["scores"][0][name] for name in ("judged", "asked", "value")] == [7, 8, 50.0]
    notes = " ".join(record["notes"])
    assert "refused 1 requests, whose verdicts are missing; the first: status 400: c" in notes
    assert "The judge takes no temperature" in notes


def test_mt_bench_is_answered_at_its_own_temperatures_unless_told_otherwise(bench, tmp_path):
    folder = mt_bench_folder(tmp_path / "mt", ("writing", "math", "stem"))
    pack = f"benchmarks=[{{pack: {folder}, against: [reference]}}]"
    with judging(lambda _: say("Rating: [[7]]")) as server:
        done = bench("--set", pack, judge=server)
        assert done.code == 0, done.err
        asked = len(server.asked)
        page = html.unescape((tmp_path / "report" / "report.html").read_text())
        assert "mt-bench against reference, the benchmark's own temperatures" in page
        told = f"benchmarks=[{{pack: {folder}, against: [reference], temperatures: generation}}]"
        other = bench("--set", told, judge=server)
        assert other.code == 0, other.err
        # The cache has what was answered alike: the greedy answers to maths.
        assert asked < len(server.asked)
    found = [
        record
        for one in artifacts(tmp_path / "store", "scores")
        for record in json.loads(one.path("scores.json").read_text())
    ]
    assert sorted(str(record["temperature"]) for record in found) == ["0.0", "0.7", "None"]
    for record in found:
        by_name = {score["name"]: score for score in record["scores"]}
        assert (by_name["rating"]["value"], by_name["rating"]["judged"]) == (7.0, 6)
        assert by_name["delta_rating"]["value"] == 0
    answers = [one.scan().collect() for one in artifacts(tmp_path / "store", "answers")]
    own = [
        dict(frame.select("question_id", "temperature").unique().iter_rows())
        for frame in answers
        if frame["temperature"].n_unique() == 3
    ]
    assert own == [{"81": 0.7, "82": 0.0, "83": 0.1}] * 2


def test_an_instruction_that_cannot_be_checked_is_told_before_anything_is_answered(
    bench, tmp_path
):  # fmt: skip
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["made:up"], "kwargs": [{}]}
    write_rows(tmp_path / "unknown" / "input_data.jsonl", [row])
    done = bench("--set", f"benchmarks=[{{pack: {tmp_path / 'unknown'}}}]")
    assert done.code == 1
    assert "lm-eval has no instruction 'made:up'" in done.err
    assert not artifacts(tmp_path / "store", "answers")


def test_the_evaluation_answers_a_packs_questions_instead(bench, packs, tmp_path):
    given = f"evaluation.questions={packs / 'ifeval'}"
    done = bench("--set", given, "--set", "evaluation.prompts=2", "--set", "benchmarks=[]")
    assert done.code == 0, done.err
    answered = [
        pl.read_parquet(one.path("answers.parquet"))
        for one in artifacts(tmp_path / "store", "evaluation")
    ]
    prompts = [frame["prompt"].to_list() for frame in answered if "1000" in frame["pair_id"]]
    assert len(prompts) == 1
    assert ["say it 0" in prompts[0][0], "say it 1" in prompts[0][1]] == [True, True]


def test_another_judge_scores_the_same_answers_of_two_policies(bench, tmp_path):
    """Head to head: here a policy with itself, whose answers are one artifact."""
    (policy,) = artifacts(tmp_path / "store", "policy")
    with judging(lambda _: say("[[A=B]]")) as server:
        assert bench(judge=server, against=[policy.name]).code == 0
        before = {one.version for one in artifacts(tmp_path / "store", "answers")}
        done = bench("--set", "judge.revision=2026-01", judge=server, against=[policy.name])
        assert done.code == 0, done.err
        assert "generate@arena-hard-v0.1 reused" in done.err
    assert {one.version for one in artifacts(tmp_path / "store", "answers")} == before
    scores = [
        json.loads(one.path("scores.json").read_text())
        for one in artifacts(tmp_path / "store", "scores")
    ]
    assert len(scores) == 3
    judged = [record for records in scores for record in records if record["key"]["judge"]]
    assert {record["opponent"] for record in judged} == {policy.name}
    assert {record["key"]["opponent_model"] for record in judged} == {f"artifact:{policy.name}"}
    assert all(record["scores"][0]["value"] == pytest.approx(50) for record in judged)


def test_mistakes_are_told_before_anything_runs(bench, packs, tmp_path, monkeypatch):
    monkeypatch.delenv("FPO_NO_SUCH_KEY", raising=False)
    store = tmp_path / "store"
    before = {info.name for info in list_artifacts(open_store(store))}
    arena = f"pack: {packs / 'arena'}"
    for benchmarks, said in {
        "{pack: /nowhere}": "/nowhere",
        f"{{{arena}, against: [policy/1]}}": "16 hex digits",
        f"{{{arena}, against: []}}": "against: [reference]",
        f"{{{arena}}}, {{{arena}}}": "once",
        f"{{{arena}, against: [policy/{'0' * 16}]}}": "0000",
        None: "judge",
    }.items():
        if benchmarks is None:
            done = bench("--only", "benchmark@arena-hard-v0.1")
        else:
            done = bench("--set", f"benchmarks=[{benchmarks}]")
        assert done.code != 0
        assert said in done.err, done.err
        assert "Traceback" not in done.err
    keyless = bench("--set", "judge={model: m, key_env: FPO_NO_SUCH_KEY}")
    assert keyless.code == 1
    assert "FPO_NO_SUCH_KEY" in keyless.err
    nothing = bench("--estimate-cost")
    assert (nothing.code, "no judge (judge.model)" in nothing.err) == (1, True)
    assert {info.name for info in list_artifacts(open_store(store))} == before
