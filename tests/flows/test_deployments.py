"""prefect.yaml: every deployment names a flow that is there, with parameters that it takes."""

import os
import re
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from flows.ablation import fpo_ablation
from flows.parameters import run_name
from flows.pipeline import fpo_pipeline
from flows.stages import fpo_train
from fpo_core.checkout import enter
from fpo_core.errors import FPOError, RecipeError
from fpo_core.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def name_of(deployment: dict) -> str:
    return f"{deployment['entrypoint']}/{deployment['name']}"


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=name_of)
def test_a_deployment_is_of_a_flow_and_a_recipe(deployment):
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert flow.name == deployment["entrypoint"].rpartition(".")[2].replace("_", "-")
    assert deployment["work_pool"]["name"] in ("fpo-cpu", "fpo-h100")
    if flow.name == "fpo-stages":  # by the pool: whoever hands stages over says of which recipe
        assert deployment["name"] == deployment["work_pool"]["name"]
        return
    flow.validate_parameters(deployment["parameters"])
    assert load_recipe(deployment["parameters"]["recipe"]).name == deployment["name"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.alhpa=1", "unknown key 'train.alhpa'; did you mean 'alpha'?"),
        ("alpha=1", "did you mean 'train.alpha'?"),
        ("train.alpha", "write key.path=value, such as train.alpha=1.0"),
        ("train.alpha=high", "train.alpha: expected a number, but got 'high'"),
    ],
)
def test_a_wrong_override_is_told_as_on_the_command_line(prefect_server, fpo, override, told):
    line = fpo("plan", "quickstart", "--set", override)
    assert told in line.err
    for flow in (fpo_pipeline, fpo_train):
        with pytest.raises(RecipeError) as refused:
            flow("quickstart", [override])
        assert str(refused.value) in line.err
    with pytest.raises(FPOError, match=re.escape(told)):
        fpo_ablation("quickstart", grid=["train.beta=0.1,0.2"], overrides=[override])


def test_the_try_out_recipe_runs_on_the_cpu_pool_alone():
    assert load_recipe("gemma2-tiny").resources.pools is None
    pools = {one["work_pool"]["name"] for one in DEPLOYMENTS if one["name"] == "gemma2-tiny"}
    assert pools == {"fpo-cpu"}


def test_a_stages_flow_for_each_pool_that_a_recipe_names():
    names = {name_of(one) for one in DEPLOYMENTS if one["entrypoint"].endswith("fpo_stages")}
    pools = load_recipe("gemma2b").resources.pools
    assert pools is not None
    assert names == {f"fpo_core.deployed.fpo_stages/{pool}" for pool in (pools.cpu, pools.gpu)}


def test_a_run_begins_in_the_folder_that_the_worker_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    monkeypatch.setenv("FPO_CHECKOUT", str(tmp_path))
    assert enter() == {"directory": str(tmp_path)}
    assert Path.cwd() == tmp_path
    monkeypatch.delenv("FPO_CHECKOUT")
    enter()
    assert (Path.cwd() / "prefect.yaml").is_file()
    monkeypatch.setenv("FPO_CHECKOUT", str(tmp_path / "gone"))
    with pytest.raises(FPOError, match=r"FPO_CHECKOUT=.*gone is no folder on this worker"):
        enter()
    os.chdir(ROOT)


@pytest.mark.parametrize(
    ("flow", "given", "name"),
    [
        ("fpo-pipeline", {"recipe": "gemma2b", "overrides": ["train.method=dpo"]}, "gemma2b dpo"),
        ("fpo-features", {"recipe": "quickstart"}, "features quickstart fpo"),
        ("fpo-stages", {"recipe": "gemma2b", "stages": ["train", "evaluate"]},
         "train evaluate gemma2b fpo"),
        ("fpo-pipeline", {"recipe": "gemma2b", "overrides": ["train.method=no"]}, "gemma2b"),
    ],
)  # fmt: skip
def test_a_runs_name_says_what_it_is(monkeypatch, flow, given, name):
    class Runtime:
        flow_name, parameters = flow, given

    monkeypatch.setattr("flows.parameters.flow_run", Runtime)
    assert run_name() == name
