"""What is loaded is what was hashed: memos of digests, and code that is never run."""

import ast
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from explorer.logits import _empty_model
from fpo_core.data.sources.identity import identify_data
from fpo_core.errors import FPOError
from fpo_core.models.load import load_model, load_tokenizer
from fpo_core.models.source import file_digest, folder_with_weights, identify
from fpo_core.sae.source import identify_sae
from tests.tiny import make_tokenizer, save_model, save_pairs, save_recipe, save_sae

SOURCES = ("cli", "explorer", "flows", "fpo_core", "storage", "tasks")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))


def age(path: Path, monkeypatch) -> None:
    """Have the clock say that a file was written long ago, so that its digest is remembered."""
    later = path.stat().st_ctime + 60
    monkeypatch.setattr("fpo_core.models.source.time.time", lambda: later)


def as_cp_p(path: Path, data: bytes) -> None:
    """`cp -p`: the same inode, other bytes."""
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    with path.open("r+b") as stream, other.open("rb") as source:
        shutil.copyfileobj(source, stream)
    shutil.copystat(other, path)
    other.unlink()


def as_rsync_a(path: Path, data: bytes) -> None:
    """`rsync -a`: another inode by the same name."""
    other = path.with_name(f".{path.name}.Xy3")
    other.write_bytes(data)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [as_cp_p, as_rsync_a])
@pytest.mark.parametrize("kind", ["model", "tokenizer", "sae", "data", "template"])
def test_a_file_that_keeps_size_and_time_has_its_new_identity(kind, change, tmp_path, monkeypatch):
    model, sae = save_model(tmp_path / "m"), save_sae(tmp_path / "sae")
    (model / "additional_chat_templates").mkdir()
    template = model / "additional_chat_templates" / "rag.jinja"
    template.write_text("{{ a }}")
    path, identity = {
        "model": (model / "model.safetensors", lambda: identify(str(model)).value),
        "tokenizer": (model / "tokenizer.json", lambda: identify(str(model)).value),
        "template": (template, lambda: identify(str(model)).value),
        "sae": (sae / "sae_weights.safetensors", lambda: identify_sae(str(sae)).value),
        "data": (
            save_pairs(tmp_path / "d.jsonl", 3),
            lambda: identify_data(str(tmp_path / "d.jsonl")).value,
        ),
    }[kind]
    age(path, monkeypatch)
    before, written, mtime = identity(), path.read_bytes(), path.stat().st_mtime_ns
    time.sleep(0.02)  # a tick of the file system's clock
    change(path, written[:-1] + bytes([written[-1] ^ 1]))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (len(written), mtime)
    age(path, monkeypatch)
    assert identity() != before
    change(path, written)
    age(path, monkeypatch)
    assert identity() == before


def test_a_digest_is_read_once_and_not_while_the_file_may_be_changing(tmp_path, monkeypatch):
    path = tmp_path / "w"
    path.write_bytes(b"1" * 100)
    assert file_digest(path) == hashlib.sha256(b"1" * 100).hexdigest()
    assert not list((tmp_path / "cache").rglob("*"))  # written just now: the next may be as well
    age(path, monkeypatch)
    file_digest(path)
    (memo,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    memo.write_text("0" * 64)
    assert file_digest(path) == "0" * 64


def test_plan_rehash_reads_every_file_again(fpo, tmp_path, monkeypatch):
    recipe = save_recipe(tmp_path / "r")
    arguments = ("plan", recipe, "--store", tmp_path / "store", "--json")
    right = json.loads(fpo(*arguments).out)["stages"]
    age(recipe, monkeypatch)
    fpo(*arguments)
    for memo in (tmp_path / "cache" / "digests").iterdir():
        memo.write_text("0" * 64)  # as on a file system whose times say nothing
    assert json.loads(fpo(*arguments).out)["stages"] != right
    assert json.loads(fpo(*arguments, "--rehash").out)["stages"] == right
    assert json.loads(fpo(*arguments).out)["stages"] == right


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: (m / "adapter_config.json").write_text("{}"), "makes it an adapter"),
        (lambda m: alter(m / "config.json", transformers_weights="x.safetensors"), "names its we"),
        (lambda m: index(m, "../model.safetensors"), "not the name of a file of this folder"),
        (lambda m: index(m, "part-2.safetensors"), "part-2.safetensors, which .* is missing"),
        (lambda m: index(m, 5), "has the weights 5"),
        (lambda m: (m / "model.safetensors.index.json").write_text("[]"), "expected a JSON object"),
        (lambda m: (m / "config.json").write_text("[" * 99_999), "nested too deeply"),
        (lambda m: (m / "config.json").write_text("{"), "not JSON"),
        (
            lambda m: alter(m / "config.json", model_type="own", auto_map={"AutoConfig": "own.C"}),
            "never run",
        ),
    ],
)
def test_a_folder_that_loads_more_than_its_files_is_refused(spoil, told, tmp_path):
    folder = save_model(tmp_path / "m")
    spoil(folder)
    with pytest.raises(FPOError, match=told):
        identify(str(folder))


def test_pickled_weights_are_refused_by_name(tmp_path):
    folder = save_model(tmp_path / "m")
    model = load_model(folder, dtype="float32", attention="eager")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    identify(str(folder))  # safetensors beside it: those are loaded
    (folder / "model.safetensors").unlink()
    with pytest.raises(FPOError, match=r"no \*\.safetensors file. It has pytorch_model.bin, which"):
        identify(str(folder))
    with pytest.raises(FPOError, match="could not be loaded"):
        load_model(folder, dtype="float32", attention="eager")


def alter(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def index(folder: Path, name: object) -> None:
    values = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))


def test_sharded_weights_are_hashed_and_loaded(tmp_path):
    folder = save_model(tmp_path / "m")
    whole = load_model(folder, dtype="float32", attention="eager")
    whole.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    before = identify(str(folder_with_weights(str(folder)))).value
    shard = sorted(folder.glob("*.safetensors"))[-1]
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert identify(str(folder)).value != before


def test_no_loader_runs_code_that_a_folder_brings(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "m")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    alter(folder / "config.json", auto_map=own)
    alter(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokens", None]})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ids = torch.tensor([[1, 2, 3]])
    loaded = load_model(folder, dtype="float32", attention="eager")
    assert loaded(ids).logits.isfinite().all()
    assert load_tokenizer(folder)("fox")["input_ids"] == make_tokenizer()("fox")["input_ids"]
    assert _empty_model(folder).config.model_type == "llama"
    identify(str(folder))


def test_every_loader_says_that_it_runs_no_code():
    """Also in those that no test here reaches, such as vLLM's."""
    silent = []
    for path in (file for name in SOURCES for file in (ROOT / name).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and _loads(call.func) and not _says_no(call):
                silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not silent


def _loads(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    return function.attr == "LLM" or (
        function.attr in ("from_pretrained", "from_config")
        and isinstance(function.value, ast.Name)
        and function.value.id.startswith("Auto")
    )


def _says_no(call: ast.Call) -> bool:
    return any(
        word.arg == "trust_remote_code"
        and isinstance(word.value, ast.Constant)
        and word.value.value is False
        for word in call.keywords
    )
