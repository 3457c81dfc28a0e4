"""Recipes: what is accepted, what is refused and in which words, and that every key is read."""

import re
import traceback
from pathlib import Path

import pytest
from pydantic import BaseModel

from fpo_core.errors import RecipeError
from fpo_core.recipe import load_recipe, parse_overrides
from fpo_core.recipe.load import shipped_recipes
from fpo_core.recipe.schema import Recipe
from fpo_core.validation import all_keys

ROOT = Path(__file__).parents[2]
MINIMAL = """
name: mine
model: {source: ./model}
data: {train: [a.jsonl], heldout: [b.jsonl]}
sae: {source: ./sae, layer: 3}
"""


def save(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_shipped_recipes_load():
    assert set(shipped_recipes()) >= {"quickstart", "gemma2b", "gemma9b"}
    for name in shipped_recipes():
        assert load_recipe(name).name == name


def test_gemma2b_has_the_papers_settings():
    """Table 5 and section 4 of arXiv 2411.07618."""
    recipe = load_recipe("gemma2b")
    train = recipe.train
    assert (train.method, train.lr, train.batch_size, train.epochs) == ("fpo", 5e-7, 32, 1)
    assert (train.warmup_steps, train.optimizer, train.k) == (150, "adam", 50)
    assert train.activation_checkpointing
    assert train.stop_gradient
    assert recipe.data.max_length == 2048
    assert (recipe.sae.layer, recipe.resources.ranks) == (25, 4)
    assert recipe.sae.source == "gemma-scope-2b-pt-res:layer_25/width_16k/average_l0_55"
    assert load_recipe("gemma9b").train.optimizer == "rmsprop"
    assert load_recipe("gemma9b").train.lr == 5e-7  # inherited


def test_recipes_are_frozen():
    recipe = load_recipe("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_base_is_merged_section_by_section(tmp_path):
    save(tmp_path, MINIMAL + "train: {lr: 1e-5, k: 20}\n", "base.yaml")
    recipe = load_recipe(save(tmp_path, "base: base\nname: mine\ntrain: {lr: 2.0e-5}\n"))
    assert (recipe.train.lr, recipe.train.k, recipe.sae.layer) == (2e-5, 20, 3)


def test_overrides_are_typed_like_yaml(tmp_path):
    path = save(tmp_path, MINIMAL)
    recipe = load_recipe(
        path, ["train.lr=5e-7", "data.train=[x.jsonl, y.jsonl]", "data.limit=null"]
    )
    assert recipe.train.lr == 5e-7
    assert [source.path for source in recipe.data.train] == ["x.jsonl", "y.jsonl"]
    assert parse_overrides(["a.b=1", "c=x=y"]) == {"a.b": 1, "c": "x=y"}


REFUSED = {
    "unknown key": ("train: {alhpa: 1}", (), r"unknown key 'train\.alhpa'; did you mean 'alpha'\?"),
    "key of another section": ("alpha: 1", (), r"'alpha'; did you mean 'train\.alpha'\?"),
    "unknown in override": ("", ("train.betta=1",), r"'train\.betta'; did you mean 'beta'\?"),
    "wrong type": ("train: {lr: fast}", (), r"train\.lr: expected a number, but got 'fast'"),
    "negative": ("train: {lr: -1}", (), r"train\.lr: .*greater than 0, but got -1"),
    "unknown choice": ("", ("train.optimizer=sgd",), r"train\.optimizer: .*'adam', 'adamw' or"),
    "unknown objective": (
        "", ("train.method=tdpo",), r"unknown objective; did you mean 'tdpo\d'\? Objectives: fpo",
    ),
    "alpha of DPO": (
        "", ("train.method=dpo", "train.alpha=1"), r"alpha weighs.*dpo has none.*fpo, tdpo2",
    ),
    "gamma of FPO": ("", ("train.gamma=1",), r"train\.gamma is SimPO's"),
    "top-k beyond the cache": ("", ("train.k=300",), r"train\.k=300.*raise features\.cache_k"),
    "infinite": ("", ("train.lr=.inf",), r"train\.lr: .*finite"),
    "two SAEs": (
        "", ("sae.train={text: [], d_sae: 1, k: 1, steps: 1, lr: 1}",),
        "exactly one of sae.source and sae.train",
    ),
    "offload without ZeRO": (
        "", ("resources.offload=optimizer",),
        r"resources\.offload=optimizer takes train\.zero_stage=1 or 2 or 3, it is 0",
    ),
    "offload of all without ZeRO-3": (
        "", ("resources.offload=all", "train.zero_stage=2"), r"takes train\.zero_stage=3, it is 2",
    ),
    "unknown offload": (
        "", ("resources.offload=nvme",), r"offload: .*'none', 'optimizer' or 'all'.*'nvme'",
    ),
    "unknown ZeRO stage": (
        "", ("train.zero_stage=4",), r"train\.zero_stage: .*0, 1, 2 or 3, but got 4",
    ),
    "a cluster without Ray": (
        "", ("resources.inference.gpus=1",), r"inference\.gpus is for resources\.inf.*runner=ray",
    ),
    "an address without a port": (
        "", ("resources.inference={runner: ray, address: head}",), r"inference\.address: ",
    ),
    "port without hosts": (
        "", ("resources.master_port=29500",), r"master_port is for several hosts",
    ),
    "port of the system": (
        "", ("resources.master_port=22",), r"master_port: .*at least 1024",
    ),
    "a judge without a model": ("judge: {concurrency: 2}", (), r"'judge\.model' is missing"),
    "a judge at no address": (
        "judge: {model: m, base_url: 'localhost:8000/v1'}", (), r"base_url is no http:// or https:",
    ),
    "no requests in flight": (
        "judge: {model: m, concurrency: 0}", (), r"judge\.concurrency: .*at least 1",
    ),
    "no equals sign": ("", ("train.alpha",), r"--set 'train\.alpha': write key\.path=value"),
    "value as section": ("", ("name.x=1",), r"'name' is a value, not a section"),
    "bad YAML": ("train: [", (), r"mine\.yaml: not YAML \("),
    "bad YAML override": ("", ("train={",), r"--set 'train=\{': the value is wrong: not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_in_words(tmp_path, case):
    text, overrides, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        load_recipe(save(tmp_path, MINIMAL + text), overrides)


def test_a_judge_is_read(tmp_path):
    text = "judge: {model: m, price: {prompt: 1, reply: 2.5}}\n"
    recipe = load_recipe(save(tmp_path, MINIMAL + text), ["judge.key_env=null"])
    judge = recipe.judge
    assert judge.key_env is None
    assert (judge.host, judge.concurrency, judge.price.reply) == ("api.openai.com", 8, 2.5)
    assert load_recipe(save(tmp_path, MINIMAL)).judge is None


KEY = "sk-made-up-3kXq81"
HOLDING_A_KEY = {
    "as user": {"base_url": f"https://{KEY}@host/v1"},
    "as password": {"base_url": f"https://me:{KEY}@host/v1"},
    "in a query": {"base_url": f"https://host/v1?key={KEY}"},
    "in a fragment": {"base_url": f"https://host/v1#{KEY}"},
    "at a port": {"base_url": f"https://host:{KEY}/v1"},
    "as address": {"base_url": KEY},
    "as variable": {"key_env": KEY},
    "in a key of its own": {"api_key": KEY},
}


@pytest.mark.parametrize("case", HOLDING_A_KEY)
def test_a_judges_key_in_a_recipe_is_refused_and_not_repeated(tmp_path, case):
    values = {f"judge.{name}": value for name, value in HOLDING_A_KEY[case].items()}
    with pytest.raises(RecipeError, match="judge") as caught:
        load_recipe(save(tmp_path, MINIMAL), {"judge.model": "m", **values})
    told = "".join(traceback.format_exception(caught.value))
    assert KEY not in told


def test_a_missing_section_is_named(tmp_path):
    with pytest.raises(RecipeError, match="'model' is missing and has no default"):
        load_recipe(save(tmp_path, MINIMAL.replace("model: {source: ./model}", "")))


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(RecipeError, match=r"'quickstrat'; did you mean 'quickstart'\?.*gemma2b"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"'no/such\.yaml' does not exist"):
        load_recipe("no/such.yaml")


def test_a_circle_of_bases_is_refused(tmp_path):
    save(tmp_path, "base: b\n", "a.yaml")
    save(tmp_path, "base: a\n", "b.yaml")
    with pytest.raises(RecipeError, match="`base` goes in a circle"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_every_setting_is_read_by_the_code():
    """A key that nothing reads would be a promise that is not kept."""
    sources = [
        path.read_text()
        for package in ("fpo_core", "tasks", "flows", "cli")
        for path in (ROOT / package).rglob("*.py")
        if path.parent.name != "recipe" or path.name not in ("schema.py", "training.py", "judge.py")
    ]
    text = "\n".join(sources)
    unread = [
        key
        for key in all_keys(Recipe)
        if not re.search(rf"\.{re.escape(key.rpartition('.')[2])}\b", text)
    ]
    # `description` is for the reader of the recipe; `site` has one value, which the schema checks.
    assert [key for key in unread if key not in ("description", "sae.site")] == []


def test_every_setting_says_what_it_is():
    def walk(model: type[BaseModel]):
        for name, field in model.model_fields.items():
            yield model.__name__, name, field

    sections = [Recipe, *(f.annotation for f in Recipe.model_fields.values())]
    plain = {"seed", "epochs", "optimizer", "activation_checkpointing", "name", "description"}
    missing = [
        (owner, name)
        for section in sections
        if isinstance(section, type) and issubclass(section, BaseModel) and section is not Recipe
        for owner, name, field in walk(section)
        if not field.description and name not in plain
    ]
    assert missing == []
