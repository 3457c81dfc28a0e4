"""The Kubernetes files, filled in by prefect-kubernetes' own worker, beside Kubernetes' schemas."""

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBERNETES = "1.31"
pytestmark = pytest.mark.usefixtures("prefect_server")  # asked for blocks that a template names


def job_of(pool: str, **variables: Any) -> dict[str, Any]:
    """The job that a worker of this pool would make for a flow run."""
    template = json.loads((FOLDER / f"{pool}.json").read_text())
    made = asyncio.run(
        KubernetesWorkerJobConfiguration.from_template_and_values(template, variables)
    )
    made.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="quickstart-fpo"))
    return made.job_manifest


@pytest.mark.parametrize("pool", ["fpo-cpu", "fpo-h100"])
def test_a_pools_job_is_one_of_kubernetes(pool):
    job = job_of(pool)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == {"fpo-cpu": None, "fpo-h100": 1}[pool]
    assert "PREFECT__FLOW_RUN_ID" in {entry["name"] for entry in container["env"]}
    assert container["args"]
    shared = {one["name"]: one for one in pod["volumes"]}["shared-memory"]["emptyDir"]
    assert shared["medium"] == "Memory"  # NCCL's rings; the 64 MB of a container are too few


def test_what_a_deployment_sets_is_in_the_job():
    job = job_of("fpo-h100", gpus=8, image="registry.example.org/fpo-pipeline:2", memory="900Gi")
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.org/fpo-pipeline:2"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "memory": "900Gi"}


def test_namespace_and_account_are_ones_of_kubernetes():
    kinds = []
    for document in yaml.safe_load_all((FOLDER / "namespace.yaml").read_text()):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        kinds.append(document["kind"])
    assert kinds == ["Namespace", "ServiceAccount"]
