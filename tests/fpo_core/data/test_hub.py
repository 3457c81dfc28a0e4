"""Datasets from a hub: a real server on loopback, read by processes that know no other hub."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fpo_core.data.sources.hub import hub_split
from fpo_core.data.sources.splits import split_files
from fpo_core.errors import FPOError
from tests.hub_server import TOKEN, Hub, serving
from tests.tiny import save_recipe

ROOT = Path(__file__).parents[3]
NAME = "owner/feedback"
SPLITS = ("train_prefs", "test_prefs")

# As published: HuggingFaceH4/ultrafeedback_binarized.
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
ULTRAFEEDBACK = pa.schema(
    [
        ("prompt", pa.string()),
        ("prompt_id", pa.string()),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("messages", MESSAGES),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
    ]
)


def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}]


def parquet(*answers: str, prompt: str = "Which?") -> bytes:
    rows = [
        {
            "prompt": prompt,
            "prompt_id": "0" * 64,
            "chosen": conversation(prompt, answer),
            "rejected": conversation(prompt, "None."),
            "score_chosen": 8.0,
            "messages": conversation(prompt, answer),
            "score_rejected": 2.5,
        }
        for answer in answers
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=ULTRAFEEDBACK), sink)
    return sink.getvalue()


def jsonl(*answers: str) -> bytes:
    rows = [{"prompt": "Which?", "chosen": answer, "rejected": "None."} for answer in answers]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub():
    hub = Hub()
    hub.commit(
        NAME,
        {
            "README.md": b"# Feedback",
            "data/train_prefs-00000-of-00002.parquet": parquet("one", "two"),
            "data/train_prefs-00001-of-00002.parquet": parquet("three"),
            "data/test_prefs-00000-of-00001.parquet": parquet("four", prompt="How many?"),
            "data/train_sft-00000-of-00001.parquet": parquet("unwanted"),
        },
    )
    return hub


@pytest.fixture
def address(hub):
    with serving(hub) as address:
        yield address


def environment(tmp_path, address, **more):
    return {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "FPO_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        **more,
    }


@pytest.fixture
def read(tmp_path, address):
    """Read sources in a process of its own; the cache stays from one to the next."""

    def call(*sources, **more):
        done = subprocess.run(
            [sys.executable, "-m", "tests.hub_client", *sources],
            cwd=tmp_path,
            env=environment(tmp_path, address, **more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def answers(found):
    return [chosen for chosen, _ in found["pairs"]]


def test_a_split_is_fetched_with_its_commit_and_its_places(hub, read):
    train, heldout = read(f"{NAME}:train_prefs", f"{NAME}:test_prefs")
    commit = hub.branches[NAME, "main"]
    assert train["identity"] == f"hub-data:{NAME}@{commit}:default:train_prefs"
    assert train["pairs"] == [
        ["one", f"{NAME}:train_prefs (train_prefs-00000-of-00002.parquet), row 1"],
        ["two", f"{NAME}:train_prefs (train_prefs-00000-of-00002.parquet), row 2"],
        ["three", f"{NAME}:train_prefs (train_prefs-00001-of-00002.parquet), row 1"],
    ]
    assert heldout["pairs"] == [["four", f"{NAME}:test_prefs, row 1"]]
    assert not any("train_sft" in path for path in hub.requests)


def test_a_moved_commit_is_another_identity_but_for_a_pinned_one(hub, read):
    first = hub.branches[NAME, "main"]
    sources = (f"{NAME}:test_prefs", f"{NAME}@{first}:test_prefs")
    before = read(*sources)
    assert before[0] == {**before[1], "pairs": before[0]["pairs"]}
    second = hub.commit(NAME, {"data/test_prefs-00000-of-00001.parquet": parquet("five")})
    moved, pinned = read(*sources)
    assert second in moved["identity"]
    assert answers(moved) == ["five"]
    assert pinned == before[1]
    assert first in pinned["identity"]


def test_the_cache_serves_without_a_hub(hub, read):
    source = f"{NAME}:train_prefs"
    (fetched,) = read(source)
    asked = len(hub.requests)
    offline, other = read(source, f"{NAME}:test_prefs", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert offline == fetched
    assert other == {"identity": f"hub-data:{NAME}:test_prefs", "resolved": False}
    hub.down = True
    assert read(source) == [fetched]
    assert read(source, HF_ENDPOINT="http://127.0.0.1:9") == [fetched]
    assert read(source, HF_HUB_OFFLINE="1", HF_HOME="elsewhere")[0]["resolved"] is False


def test_a_part_of_a_split_in_the_cache_is_not_the_split(hub, read, tmp_path):
    source = f"{NAME}:train_prefs"
    read(source)
    (blob,) = tmp_path.glob("hf/hub/datasets--*/snapshots/*/data/*00001-of-00002.parquet")
    blob.unlink()
    assert read(source, HF_HUB_OFFLINE="1")[0]["resolved"] is False
    assert answers(read(source)[0]) == ["one", "two", "three"]


def test_the_hubs_conversion_is_read_where_the_repository_has_no_readable_split(hub, read):
    hub.commit("owner/zipped", {"loader.py": b"raise SystemExit", "train.jsonl.gz": b"?"})
    converted = hub.commit(
        "owner/zipped",
        {
            "en/train/0000.parquet": parquet("six"),
            "en/train/0001.parquet": parquet("seven"),
            "de/train/0000.parquet": parquet("sieben"),
            "de/test/0000.parquet": parquet("acht"),
        },
        "refs/convert/parquet",
    )
    sources = (
        "owner/zipped:en:train",
        "owner/zipped:test",
        "owner/zipped:train",
        f"owner/zipped@{converted}:en:train",
        "owner/zipped:fr:train",
    )
    named, only, several, pinned, unknown = found = read(*sources)
    assert named["identity"] == f"hub-data:owner/zipped@{converted}:en:train"
    assert answers(named) == answers(pinned) == ["six", "seven"]
    assert only["identity"].endswith(":de:test")
    assert "several configurations have a split 'train': de, en" in several["error"]
    assert "in the configuration 'fr'; there are: de:test, de:train, en:train" in unknown["error"]
    assert read(*sources[:2], HF_HUB_OFFLINE="1") == found[:2]


def test_slices_of_a_split_go_over_its_files(hub, read):
    specs = ("[1:]", "[:50%]", "[-1:]", "[:1]")
    found = read(f"{NAME}:train_prefs", *(f"{NAME}:train_prefs{spec}" for spec in specs))
    whole, *parts = found
    assert [part["identity"] for part in parts] == [f"{whole['identity']}{spec}" for spec in specs]
    assert [answers(part) for part in parts] == [
        ["two", "three"],
        ["one", "two"],
        ["three"],
        ["one"],
    ]
    assert parts[2]["pairs"] == whole["pairs"][2:]
    assert read(f"{NAME}:train_prefs[:50%]", HF_HUB_OFFLINE="1") == [parts[1]]
    (empty,) = read(f"{NAME}:train_prefs[8:]")
    assert "[8:] of data 'owner/feedback:train_prefs' holds no rows" in empty["error"]


def test_compressed_files_are_read_where_nothing_else_is_there(hub, read):
    lines = gzip.compress(jsonl("a", "b"))
    hub.commit("owner/gz", {"base/train.jsonl.gz": lines, "base/test.csv": b"chosen\nc\n"})
    train, test, dev = read("owner/gz:train", "owner/gz:base:test", "owner/gz:dev")
    assert train["identity"].endswith(":base:train")
    assert (answers(train), answers(test)) == (["a", "b"], ["c"])
    assert "there is no split 'dev'; there are: base:test, base:train" in dev["error"]
    assert read("owner/gz:train", HF_HUB_OFFLINE="1") == [train]


def test_json_files_are_read_whatever_their_layout(hub, read):
    pairs = [json.loads(line) for line in jsonl("b", "c").splitlines()]
    hub.commit(
        "owner/json",
        {
            "train.jsonl": jsonl("a"),
            "test.json": json.dumps(pairs).encode(),
            "dev.json": jsonl("d"),
            "bad.jsonl": jsonl("e") + b"{",
        },
    )
    train, test, dev, bad = read(
        *(f"owner/json:{split}" for split in ("train", "test", "dev", "bad"))
    )
    assert train["pairs"] == [["a", "owner/json:train, line 1"]]
    assert [answers(found) for found in (test, dev)] == [["b", "c"], ["d"]]
    assert bad["error"].startswith("owner/json:bad, line 2: not JSON")


def test_what_cannot_be_had_is_told_with_the_remedy(hub, read):
    hub.commit("owner/pictures", {"cat.png": b"?"})
    told = read(
        "owner/nothing:train",
        f"{NAME}:train",
        "owner/pictures:train",
        f"{NAME}@v9:train_prefs",
        "owner/a..b:train",
    )
    unknown, split, pictures, revision, name = (found["error"] for found in told)
    assert "the hub has no dataset 'owner/nothing', or none that you may read" in unknown
    assert "HF_TOKEN" in unknown
    assert "no split 'train'; there are: test_prefs, train_prefs, train_sft" in split
    assert "no Parquet, JSONL or JSON files to read; save the split as" in pictures
    assert "the dataset has no revision 'v9'" in revision
    assert "'owner/a..b' cannot be a dataset's name" in name


def test_a_gated_dataset_asks_for_a_token_and_never_tells_it(hub, read):
    hub.gated.add(NAME)
    source = f"{NAME}:test_prefs"
    refused = [read(source)[0]["error"], read(source, HF_TOKEN="hf_another")[0]["error"]]
    for error in refused:
        assert "gated" in error
        assert "HF_TOKEN" in error
        assert "hf_another" not in error
    assert answers(read(source, HF_TOKEN=TOKEN)[0]) == ["four"]


def test_files_that_the_hub_lists_and_does_not_give(hub, read):
    hub.only_lists = True
    (told,) = read(f"{NAME}:test_prefs")
    assert told["error"].startswith(f"data '{NAME}:test_prefs': could not be fetched from the hub")
    assert "or save the split as Parquet or JSONL and give the file" in told["error"]


FILES = [
    "train.parquet",
    "train.jsonl",
    "train-00000-of-00002.jsonl",
    "x/train/0000.parquet",
    "x/test/part-00001.jsonl",
    "x/test/part-00000.jsonl",
    "data/y/dev-00000-of-00001-0a1b.json",
    "helpful/train.jsonl",
    "train_sft.parquet",
    "dataset_infos.json",
    "train.csv",
]


@pytest.mark.parametrize(
    ("split", "config", "expected"),
    [
        ("train", None, ("default", ("train.parquet",))),  # one kind, and the default configuration
        ("train", "x", ("x", ("x/train/0000.parquet",))),
        ("train", "helpful", ("helpful", ("helpful/train.jsonl",))),
        ("helpful", None, None),  # a folder of splits is no split
        ("test", None, ("x", ("x/test/part-00000.jsonl", "x/test/part-00001.jsonl"))),
        ("dev", None, ("y", ("data/y/dev-00000-of-00001-0a1b.json",))),
        ("dataset_infos", None, None),
        ("tra", None, None),
    ],
)
def test_file_names_say_splits(split, config, expected):
    assert split_files(FILES, split, config) == expected


def test_names_of_splits(tmp_path, monkeypatch):
    assert hub_split("a/b:c")[1:] == ("a/b", None, None, "c")
    assert hub_split("a/b@refs/pr/4:en:c")[1:] == ("a/b", "refs/pr/4", "en", "c")
    for path in ("a/b.jsonl", "/a/b:c", "./a/b:c", "a/b/c:d", "b:c"):
        assert hub_split(path) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b:c").touch()
    assert hub_split("a/b:c") is None  # a file of this name is the file


def test_a_name_without_split_says_what_is_missing():
    from fpo_core.data.sources.identity import identify_data

    with pytest.raises(FPOError, match="a dataset of the hub is OWNER/NAME:SPLIT"):
        identify_data("HuggingFaceH4/ultrafeedback_binarized")


@pytest.mark.slow
def test_a_recipe_with_hub_data_plans_and_tokenizes(hub, tmp_path, address):
    recipe = save_recipe(
        tmp_path / "r", data={"train": [f"{NAME}:train_prefs"], "heldout": [f"{NAME}:test_prefs"]}
    )
    tokenize = (
        "import sys\nfrom tasks.run import prepare_run\nfrom tasks.tokenize import tokenize\n"
        "run, stages = prepare_run(sys.argv[1], [], sys.argv[2], only='tokenize')\n"
        "print(tokenize.fn(run).state)"
    )

    def call(*command):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment(tmp_path, address),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    store = str(tmp_path / "store")
    assert call("-c", tokenize, str(recipe), store) == "computed\n"
    (shard,) = Path(store).glob("artifacts/pairs/*/data/00000.parquet")
    assert pq.read_table(shard)["source"].to_pylist() == [
        "feedback:train_prefs (train_prefs-00000-of-00002.parquet), row 1",
        "feedback:train_prefs (train_prefs-00000-of-00002.parquet), row 2",
        "feedback:train_prefs (train_prefs-00001-of-00002.parquet), row 1",
        "feedback:test_prefs, row 1",
    ]
    hub.down = True
    plan = call("-m", "cli.main", "plan", str(recipe), "--store", store)
    assert "reuse" in plan
    assert "not reachable" not in plan
    hub.down = False
    hub.commit(NAME, {f"data/{split}.parquet": parquet("new") for split in SPLITS})
    assert "reuse" not in call("-m", "cli.main", "plan", str(recipe), "--store", store)
