"""Cluster files, checked without Ray's launcher or Kubernetes as these would read them."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.submit.parcel import pack
from pipeline.job.config import load_job
from tests.conftest import ROOT

CLUSTERS = [
    ROOT / "cluster.yaml",
    *sorted((ROOT / "examples").glob("cluster-*.yaml")),
]


@pytest.fixture(params=CLUSTERS, ids=lambda path: path.stem)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Read a cluster file with the defaults that Ray's launcher adds."""
    given: dict[str, Any] = yaml.safe_load(request.param.read_text())
    return dict(prepare_config(given))


def test_rays_launcher_takes_it(cluster: dict[str, Any]) -> None:
    validate_config(cluster)
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert cluster["max_workers"] >= max(kind.get("max_workers", 0) for kind in types.values())
    for kind in types.values():
        assert kind.get("min_workers", 0) <= kind.get("max_workers", cluster["max_workers"])


def test_commands_are_a_shells(cluster: dict[str, Any]) -> None:
    keys = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in [line for key in keys for line in cluster[key]]:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_what_is_installed_is_offered(cluster: dict[str, Any]) -> None:
    """The named extras exist, and the installed folder is the uploaded one."""
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = offered["optional-dependencies"]
    (install,) = [line for line in cluster["setup_commands"] if "pip" in line and "install" in line]
    named = install.partition("[")[2].partition("]")[0].split(",")
    assert "cluster" in named, "the head needs Ray's job server"
    assert set(named) <= set(extras)
    (there,) = cluster["file_mounts"]
    assert there.removeprefix("~/") in install


def test_the_dashboard_is_not_open_to_the_network(cluster: dict[str, Any]) -> None:
    (head,) = [line for line in cluster["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head


def test_images_have_a_ray_that_the_project_takes(manifest: dict[str, dict[str, Any]]) -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = [r for r in map(Requirement, requirements) if r.name == "ray"]
    images = [yaml.safe_load(path.read_text()).get("docker", {}).get("image") for path in CLUSTERS]
    tags = [image.rpartition(":")[2] for image in images if image]
    assert len(tags) == 2
    for tag in tags:
        number, python, _ = tag.split("-")
        assert number in ray.specifier
        assert python == "py311"
    assert manifest["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] in ray.specifier


@pytest.fixture
def manifest() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "examples" / "rayjob.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_the_job_of_the_rayjob_runs_on_a_cluster(
    manifest: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(manifest["ConfigMap"]["data"]["job.yaml"])
    job = load_job(tmp_path / "job.yaml")
    assert pack(job).shared == []
    groups = manifest["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    # `auto` would count only GPUs that already exist.
    assert job.targets.workers <= groups[0]["maxReplicas"]
    assert job.update.ranks <= groups[0]["maxReplicas"]


def test_the_rayjob_is_built_as_kuberay_reads_it(manifest: dict[str, dict[str, Any]]) -> None:
    """Checks the important fields by hand: KubeRay's schema needs a network."""
    job, config = manifest["RayJob"], manifest["ConfigMap"]
    assert (job["apiVersion"], config["apiVersion"]) == ("ray.io/v1", "v1")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    head = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    (mount,), (volume,) = container["volumeMounts"], head["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (file,) = config["data"]
    assert spec["entrypoint"] == f"pmet run {mount['mountPath']}/{file}"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (worker,) = group["template"]["spec"]["containers"]
        assert worker["image"] == container["image"]
        limits = worker["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"]
    for value in cluster["headGroupSpec"]["rayStartParams"].values():
        assert isinstance(value, str), "they become command-line options"


def test_there_is_a_file_for_every_provider_that_the_docs_name() -> None:
    kinds = {yaml.safe_load(path.read_text())["provider"]["type"] for path in CLUSTERS}
    assert kinds == {"aws", "gcp", "local"}
