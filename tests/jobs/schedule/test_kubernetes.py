"""Kubernetes objects: their structure, and the behaviour of their script."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.schedule.kubernetes import Cluster, kubernetes_cron, manifests
from pipeline.errors import ScheduleError, StorageError
from pipeline.job.yaml_files import parse_yaml
from tests.jobs.schedule.conftest import schedule

REFRESH = 'facts: "it\'s"\nlines: |\n  a\n  b\n# ---\n'


@pytest.fixture
def refresh(tmp_path: Path) -> str:
    (tmp_path / "refresh.yaml").write_text(REFRESH)
    return str(tmp_path / "refresh.yaml")


def objects(refresh: str, cluster: Cluster | None = None, **values: Any) -> dict[str, Any]:
    """Return the objects by kind, including the RayJob in the ConfigMap."""
    cluster = cluster or Cluster(image="registry/pmet:1", ray_version="2.52.0")
    text = manifests(schedule(refresh=refresh, **values), cluster)
    found = {one["kind"]: one for one in yaml.safe_load_all(text)}
    found["RayJob"] = parse_yaml(found["ConfigMap"]["data"]["rayjob.yaml"])
    return found


def test_the_cron_job_runs_at_the_schedules_times_and_never_twice(refresh: str) -> None:
    found = objects(refresh, cron="30 2 * * 7", timezone="Europe/Berlin")["CronJob"]
    spec = found["spec"]
    assert (found["apiVersion"], found["metadata"]["name"]) == ("batch/v1", "pmet-facts")
    assert (spec["schedule"], spec["timeZone"]) == ("30 2 * * 0", "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec["suspend"]) == ("Forbid", False)
    assert spec["startingDeadlineSeconds"] == 12 * 3600
    job = spec["jobTemplate"]["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    late = objects(refresh, catch_up="never", enabled=False)["CronJob"]["spec"]
    assert (late["startingDeadlineSeconds"], late["suspend"]) == (3600, True)


def test_its_pod_may_do_what_its_script_does_and_finds_its_files(refresh: str) -> None:
    found = objects(refresh, Cluster(image="i", ray_version="2.52.0", namespace="nightly"))
    for kind, one in found.items():
        assert one["metadata"]["namespace"] == "nightly", kind
    pod = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = found["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    (subject,), role = found["RoleBinding"]["subjects"], found["RoleBinding"]["roleRef"]
    assert subject == {"kind": "ServiceAccount", "name": account, "namespace": "nightly"}
    assert (role["kind"], role["name"]) == ("Role", found["Role"]["metadata"]["name"])
    (rule,) = found["Role"]["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    assert set(rule["verbs"]) == {"create", "get", "list"}
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    files = [f"{mount['mountPath']}/{key}" for key in found["ConfigMap"]["data"]]
    assert container["command"][1] in files
    selector, manifest = container["args"]
    assert manifest in files
    key, _, value = selector.partition("=")
    assert found["RayJob"]["metadata"]["labels"][key] == value


def test_the_ray_job_is_a_fresh_cluster_that_runs_the_refresh(refresh: str) -> None:
    cluster = Cluster(image="registry/pmet:1", ray_version="2.52.0", workers=3, gpus=2)
    found = objects(refresh, cluster)
    job, spec = found["RayJob"], found["RayJob"]["spec"]
    assert (job["apiVersion"], job["metadata"]["generateName"]) == ("ray.io/v1", "pmet-facts-")
    assert "name" not in job["metadata"]
    assert spec["entrypoint"] == "pmet refresh /etc/pmet/refresh.yaml"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["rayVersion"] == "2.52.0"
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    limits = [
        pod["containers"][0]["resources"]["limits"] for pod in (head, workers["template"]["spec"])
    ]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, "2"]
    assert head["containers"][0]["volumeMounts"][0]["mountPath"] == "/etc/pmet"
    assert found["ConfigMap"]["data"]["refresh.yaml"] == REFRESH
    # KubeRay allows names of 47 characters, to which five are added.
    longest = objects(refresh, name="a" * 36)["RayJob"]["metadata"]["generateName"]
    assert len(longest) + 5 <= 47


def test_a_refresh_file_at_a_url_is_read_there() -> None:
    found = objects("s3://bucket/refresh.yaml")
    assert found["RayJob"]["spec"]["entrypoint"] == "pmet refresh s3://bucket/refresh.yaml"
    assert "refresh.yaml" not in found["ConfigMap"]["data"]
    with pytest.raises(ScheduleError, match="a shell would interpret; rename"):
        objects("s3://bucket/$(evil).yaml")
    with pytest.raises(StorageError, match="cannot read /nowhere/refresh"):
        objects("/nowhere/refresh.yaml")


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("30 2 * * *", "30 2 * * *"),
        ("0 2 * * 5-7", "0 2 * * 0,5,6"),
        ("*/30 1-3 * JAN *", "0,30 1,2,3 * 1 *"),
        ("0 2 1 * MON", "0 2 1 * 1"),
        ("0 2 1-31 * MON", "0 2 * * *"),
    ],
)
def test_expressions_keep_their_meaning(cron: str, expected: str) -> None:
    assert kubernetes_cron(cron) == expected


@pytest.mark.parametrize("cron", ["0 2 L * *", "0 2 */2 * MON"])
def test_what_kubernetes_cannot_say_is_refused(cron: str) -> None:
    with pytest.raises(ScheduleError, match="Kubernetes"):
        kubernetes_cron(cron)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "a b"}, "--image: 'a b' is not an image"),
        ({"image": "x\nkind: Evil"}, "--image"),
        ({"namespace": "Nightly"}, "--namespace: 'Nightly' is not a valid namespace"),
        ({"ray_version": "latest"}, "--ray-version"),
        ({"memory": "16 GB"}, "--memory"),
        ({"kubectl_image": "$(x)"}, "--kubectl-image"),
    ],
)
def test_settings_are_checked(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Cluster(**{"image": "i", **settings})  # type: ignore[arg-type]


# Replaces kubectl: ``list`` holds the output of get, ``states`` one line per poll.
KUBECTL = """#!/bin/sh
cd "$FAKE"
echo "$*" >> calls
case "$1 $2" in
  "get rayjobs") cat list ;;
  create*) echo rayjob.ray.io/pmet-facts-x1 ;;
  get*)
    line=$(head -n 1 states); sed -i 1d states
    [ "$line" = error ] && exit 1
    printf '%s' "$line" ;;
esac
"""


@pytest.mark.parametrize(
    ("listed", "states", "status", "created"),
    [
        ("", [" ", "Initializing ", "error", "Running RUNNING", "Complete SUCCEEDED"], 0, True),
        ("a Complete\nb Failed\n", ["Complete SUCCEEDED"], 0, True),
        ("", ["Failed FAILED"], 1, True),
        ("", ["Complete FAILED"], 1, True),
        ("a Complete\nb Running\n", [], 1, False),
        ("a \n", [], 1, False),
    ],
)
def test_the_script_creates_one_job_at_a_time_and_waits_for_it(
    refresh: str, tmp_path: Path, listed: str, states: list[str], status: int, created: bool
) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    (tmp_path / "list").write_text(listed)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    script = tmp_path / "night.sh"
    script.write_text(objects(refresh)["ConfigMap"]["data"]["night.sh"])
    done = subprocess.run(
        ["sh", str(script), "app=pmet-facts", "/etc/pmet/rayjob.yaml"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "FAKE": str(tmp_path), "PMET_POLL_S": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("get rayjobs --selector app=pmet-facts ")
    creations = [call for call in calls if call.startswith("create")]
    assert creations == ["create --filename /etc/pmet/rayjob.yaml --output name"] * created
    assert (tmp_path / "states").read_text() == ""
