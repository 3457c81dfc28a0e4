"""prefect.yaml: every deployment names a flow that is there, with parameters that it takes."""

from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from fpo_core.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_a_deployment_is_of_a_flow_and_a_recipe(deployment, monkeypatch):
    monkeypatch.chdir(ROOT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert flow.name == "fpo-pipeline"
    flow.validate_parameters(deployment["parameters"])
    assert load_recipe(deployment["parameters"]["recipe"]).name == deployment["name"]
    assert deployment["work_pool"]["name"] in ("fpo-cpu", "fpo-h100")


def test_every_parameter_of_the_flow_is_described():
    flow = load_flow_from_entrypoint(f"{ROOT}/flows/pipeline.py:fpo_pipeline")
    schema = flow.parameters.model_dump()["properties"]
    assert [name for name, field in schema.items() if not field.get("description")] == []
