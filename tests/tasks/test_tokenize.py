"""The stage ``tokenize`` on a real store: dates, splits, metadata, what the manifest says."""

import json
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from transformers import AutoTokenizer

from fpo_core.errors import FPOError
from storage.location import open_store
from storage.schemas import metadata_columns
from tasks.plan import make_plan
from tasks.run import prepare_run
from tasks.tokenize import _pairs
from tests.tiny import save_recipe

DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int, **more: object) -> list[dict]:
    return [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"Perhaps {n}?", **more}
        for n in range(count)
    ]


def tokenized(recipe: Path, store: Path, *overrides: str):
    """Run the stage; returns its artifact."""
    run, _ = prepare_run(str(recipe), overrides, str(store), only="tokenize")
    run.bring_about("tokenize", lambda writer: _pairs(run, writer))
    return run.artifact("tokenize")


def table(artifact) -> pl.DataFrame:
    return artifact.scan().collect()


@pytest.fixture
def dated(tmp_path) -> Path:
    """A recipe whose model's template writes the date."""
    recipe = save_recipe(tmp_path / "r")
    folder = tmp_path / "r" / "model"
    (folder / "chat_template.jinja").write_text(DATED)
    return recipe


def prompts(artifact, folder: Path) -> set[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {tokenizer.decode(ids).partition("\n")[0] for ids in table(artifact)["prompt_ids"]}


def test_a_template_that_writes_the_date_gets_the_day_of_the_first_tokenization(dated, tmp_path):
    store = tmp_path / "store"
    model = tmp_path / "r" / "model"
    run, _ = prepare_run(str(dated), [], str(store), only="tokenize")
    date = run.plan.date
    assert date is not None
    assert not date.is_recorded
    opened = open_store(store)
    # As if it had been tokenized long ago: a later day, another time zone.
    opened.record_date(date.data, "2020-01-02")
    artifact = tokenized(dated, store)
    assert prompts(artifact, model) == {"Today: 02 Jan 2020"}
    assert artifact.manifest["recipe"]["date"] == "2020-01-02"
    again = make_plan(run.recipe, opened)
    assert again.stages["tokenize"].state == "complete"


def test_the_first_tokenization_records_its_day_and_a_recipe_may_set_another(dated, tmp_path):
    store = tmp_path / "store"
    first = tokenized(dated, store)
    day = first.manifest["recipe"]["date"]
    (recorded,) = open_store(store).dates().values()
    assert recorded == day
    other = tokenized(dated, store, "data.date=2024-02-29")
    assert other.version != first.version
    assert prompts(other, tmp_path / "r" / "model") == {"Today: 29 Feb 2024"}


def test_the_recorded_day_of_another_run_stops_one_that_planned_with_its_own(dated, tmp_path):
    run, _ = prepare_run(str(dated), [], str(tmp_path / "store"), only="tokenize")
    run.store.record_date(run.plan.date.data, "2020-01-02")
    with pytest.raises(FPOError, match="first tokenized this data on 2020-01-02.*Run the same"):
        run.record_date()


def test_a_template_without_a_date_leaves_it_out_of_the_version(tmp_path):
    recipe = save_recipe(tmp_path / "r")
    artifact = tokenized(recipe, tmp_path / "store")
    assert "date" not in artifact.manifest["recipe"]
    assert open_store(tmp_path / "store").dates() == {}


def test_a_share_is_held_out_by_prompt_and_stays_when_rows_are_added(tmp_path):
    recipe = save_recipe(tmp_path / "r")
    data = rows(60) + [{**row, "chosen": row["chosen"] + " Yes."} for row in rows(60)]
    split = "data.heldout={fraction: 0.3}"

    def heldout(path: str, store: str) -> tuple[set[str], set[str]]:
        found = table(tokenized(recipe, tmp_path / store, f"data.train=[{path}]", split))
        assert len(found) == len(Path(path).read_text().splitlines())
        by_split = found.group_by("split").agg("pair_id").rows()
        ids = {name: set(pairs) for name, pairs in by_split}
        prompts = found.with_columns(pl.col("prompt_ids").cast(pl.List(pl.String)).list.join(" "))
        sides = prompts.group_by("prompt_ids").agg(pl.col("split").n_unique())
        assert sides["split"].max() == 1
        return ids["train"], ids["heldout"]

    train, held = heldout(write(tmp_path / "a.jsonl", data), "s1")
    more = [{**row, "prompt": row["prompt"] + "!"} for row in rows(40)] + data
    wider, wider_held = heldout(write(tmp_path / "b.jsonl", more), "s2")
    assert 0.15 < len(held) / len(data) < 0.45
    assert held <= wider_held
    assert train <= wider


def test_metadata_columns_stay_with_the_pairs_in_their_types(tmp_path):
    recipe = save_recipe(tmp_path / "r")
    train = [
        {**row, "topic": f"t{n % 2}", "score": n, "source": "web", "meta": {"good": n > 3}}
        for n, row in enumerate(rows(6))
    ]
    train[2]["topic"] = None
    train[5]["score"] = 2.5
    held = [{**row, "prompt": row["prompt"] + " Why?"} for row in rows(3)]
    artifact = tokenized(
        recipe,
        tmp_path / "store",
        f"data.train=[{write(tmp_path / 'a.jsonl', train)}]",
        f"data.heldout=[{write(tmp_path / 'b.jsonl', held)}]",
        "data.metadata=[topic, score, source, meta.good]",
    )
    found = table(artifact)
    assert found["topic"].to_list() == ["t0", "t1", None, "t1", "t0", "t1", None, None, None]
    assert found["score"].to_list() == [0.0, 1.0, 2.0, 3.0, 4.0, 2.5, None, None, None]
    assert found["row_source"][0] == "web"
    assert found["source"][0] == "a.jsonl, line 1"
    assert found["meta.good"].to_list()[:6] == [False] * 4 + [True] * 2
    schema = artifact.schema("")
    assert metadata_columns(schema) == ["topic", "score", "row_source", "meta.good"]
    with pytest.raises(FPOError, match="no row has 'tpoic'. The rows have 'prompt'"):
        tokenized(recipe, tmp_path / "store", "data.metadata=[tpoic]")


def test_the_manifest_says_what_became_of_every_row(tmp_path):
    recipe = save_recipe(tmp_path / "r")
    train = [*rows(30, note="x"), {"prompt": "q", "chosen": "", "rejected": "b"}]
    train.append({"prompt": "long " * 200, "chosen": "a", "rejected": "b"})
    artifact = tokenized(
        recipe,
        tmp_path / "store",
        f"data.train=[{{path: {write(tmp_path / 'a.jsonl', train)}, weight: 0.5}}]",
    )
    stats = artifact.manifest["stats"]
    source = stats["sources"][0]
    assert source["source"] == "a.jsonl"
    assert source["rows"] == 32
    assert source["unused_columns"] == {"note": 30}
    assert 0 < source["passed_over"]["weight"] < 31
    assert stats["dropped"]["empty"] == 1
    lines = [json.loads(line) for line in artifact.path("dropped.jsonl").read_text().splitlines()]
    assert len(lines) == sum(stats["dropped"].values())
    assert str(tmp_path) not in json.dumps(dict(artifact.manifest))


def test_a_signed_address_is_in_no_record(tmp_path):
    import http.server
    import threading

    recipe = save_recipe(tmp_path / "r")
    write(tmp_path / "d.jsonl", rows(12))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://me:secret@127.0.0.1:{server.server_port}/d.jsonl?X-Signature=hush"
        given = [f"data.train=['{address}']"]
        run, stages = prepare_run(str(recipe), given, str(tmp_path / "store"), only="tokenize")
        with run.recorded(stages):
            run.bring_about("tokenize", lambda writer: _pairs(run, writer))
        server.shutdown()
    assert len(table(run.artifact("tokenize")).filter(split="train")) == 12
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    texts = [path.read_bytes() for path in files]
    assert any(b"/d.jsonl" in text for text in texts)
    assert not [text for text in texts if b"hush" in text or b"secret" in text]


def test_settings_at_their_default_leave_versions_alone(tmp_path):
    recipe = save_recipe(tmp_path / "r")
    store = open_store(tmp_path / "store")

    def version(*overrides: str) -> str:
        run, _ = prepare_run(str(recipe), overrides, str(tmp_path / "store"), only="tokenize")
        return make_plan(run.recipe, store).version("tokenize")

    plain = version()
    assert version("data.truncation=drop", "data.metadata=[]", "data.max_bad_share=0.2") == plain
    for changed in (
        "data.truncation=keep_end",
        "data.truncate_answers=true",
        "data.system=fold",
        "data.heldout={fraction: 0.1}",
        f"data.train=[{{path: {tmp_path / 'r' / 'train.jsonl'}, weight: 0.5}}]",
        "data.columns={prompt: prompt}",
    ):
        assert version(changed) != plain, changed
