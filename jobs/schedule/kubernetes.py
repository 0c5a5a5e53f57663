"""Kubernetes objects that run one schedule: a CronJob that creates a KubeRay RayJob each night."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jobs.schedule.cron import Fields, fields
from jobs.schedule.due import LATE
from jobs.schedule.records import Schedule
from pipeline.errors import ScheduleError
from pipeline.job import dump_yaml
from pipeline.storage import Store, read_file

# This image has kubectl and a shell and nothing else.
KUBECTL_IMAGE = "alpine/kubectl:1.33.3"
MADE_UP_S = 12 * 3600
FOLDER = "/etc/pmet"
_CLEANED_UP_AFTER_S = 600
_CONFIG_MAP_LIMIT = 900_000
_SETTINGS = {
    "image": (r"[A-Za-z0-9][\w.:/@-]{0,254}", "an image name such as registry/name:tag"),
    "kubectl_image": (r"[A-Za-z0-9][\w.:/@-]{0,254}", "an image name such as registry/name:tag"),
    "namespace": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a valid namespace"),
    "ray_version": (r"\d+\.\d+\.\d+[\w.+-]*", "a Ray version such as 2.52.0"),
    "memory": (r"[1-9]\d*(\.\d+)?([kMGTP]i?)?", "an amount of memory such as 32Gi"),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster that a scheduled run uses.

    Attributes:
        image: image with pmet and Ray that starts like Ray's own images.
        namespace: namespace of all objects.
        workers: number of pods in addition to the head.
        cpus: CPUs per pod.
        memory: memory per pod.
        gpus: NVIDIA GPUs per worker, or of the head if there are no workers.
        ray_version: Ray version in the image; default: the one installed here.
        kubectl_image: image with ``kubectl`` and ``sh``.
    """

    image: str
    namespace: str = "default"
    workers: int = 1
    cpus: int = 4
    memory: str = "16Gi"
    gpus: int = 0
    ray_version: str = ""
    kubectl_image: str = KUBECTL_IMAGE

    def __post_init__(self) -> None:
        """Validate the values that become part of the objects."""
        if not self.ray_version:
            object.__setattr__(self, "ray_version", version("ray"))
        for name, (pattern, what) in _SETTINGS.items():
            value = str(getattr(self, name))
            if not re.fullmatch(pattern, value, re.ASCII):
                option = name.replace("_", "-")
                raise ScheduleError(f"--{option}: {value!r} is not {what}")


def manifests(schedule: Schedule, cluster: Cluster) -> str:
    """Return all objects as YAML for ``kubectl apply -f -``.

    Raises:
        ScheduleError: Kubernetes cannot express the schedule, or the refresh file cannot be put
            into an object.
        StorageError: the refresh file is local and cannot be read.
    """
    name = f"pmet-{schedule.name}"
    labels = {"app.kubernetes.io/name": "pmet", "app.kubernetes.io/instance": name}
    meta = {"name": name, "namespace": cluster.namespace, "labels": labels}
    local = Store(schedule.refresh).is_local
    data = {
        "night.sh": files("jobs.schedule").joinpath("night.sh").read_text("utf-8"),
        "rayjob.yaml": dump_yaml(_ray_job(schedule, cluster, meta, local)),
    }
    if local:
        data["refresh.yaml"] = _refresh_file(schedule.refresh)
    objects = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        _role(meta),
        _role_binding(meta),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data},
        _cron_job(schedule, cluster, meta),
    ]
    # Dumped one by one so that shared values are written out, not aliased.
    return "---\n".join(map(dump_yaml, map(_copied, objects)))


def kubernetes_cron(cron: str) -> str:
    """Return the expression in the narrower syntax of Kubernetes.

    Raises:
        ScheduleError: Kubernetes cannot express it.
    """
    parts = fields(cron)
    if parts is None:
        raise ScheduleError(f"cron {cron!r}: Kubernetes does not support L, W or #; write numbers")
    if not parts.either_day and None not in (parts.days, parts.weekdays):
        # If both are given, Kubernetes runs on days that match either.
        raise ScheduleError(
            f"cron {cron!r}: Kubernetes cannot require a day of the month and a day of the week at "
            "once; set one of them to *"
        )
    return " ".join(map(_numbers, _in_order(parts)))


def _in_order(parts: Fields) -> list[tuple[int, ...] | None]:
    return [parts.minutes, parts.hours, parts.days, parts.months, parts.weekdays]


def _numbers(numbers: Sequence[int] | None) -> str:
    return "*" if numbers is None else ",".join(map(str, numbers))


def _refresh_file(path: str) -> str:
    data = read_file(path, limit=_CONFIG_MAP_LIMIT + 1)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ScheduleError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    if len(data) > _CONFIG_MAP_LIMIT:
        raise ScheduleError(f"{path} is too large for a ConfigMap; give its URL instead")
    return text


def _ray_job(
    schedule: Schedule, cluster: Cluster, meta: dict[str, Any], local: bool
) -> dict[str, Any]:
    refresh = f"{FOLDER}/refresh.yaml" if local else schedule.refresh
    if shlex.quote(refresh) != refresh:
        raise ScheduleError(
            f"{refresh!r} has characters that a shell would interpret; rename the file to use only "
            "letters, digits and . _ - / : @ % + , ="
        )
    volume = {"name": "refresh", "configMap": {"name": meta["name"]}}
    mount = {"name": "refresh", "mountPath": FOLDER, "readOnly": True}
    head = _pod("ray-head", cluster, gpus=0 if cluster.workers else cluster.gpus)
    if local:
        head["spec"]["volumes"] = [volume]
        head["spec"]["containers"][0]["volumeMounts"] = [mount]
    workers = {
        "groupName": "workers",
        "replicas": cluster.workers,
        "minReplicas": cluster.workers,
        "maxReplicas": cluster.workers,
        "rayStartParams": {},
        "template": _pod("ray-worker", cluster, gpus=cluster.gpus),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "generateName": f"{meta['name']}-",
            "namespace": meta["namespace"],
            "labels": dict(meta["labels"]),
        },
        "spec": {
            "entrypoint": f"pmet refresh {refresh}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _CLEANED_UP_AFTER_S,
            "backoffLimit": 0,
            "rayClusterSpec": {
                "rayVersion": cluster.ray_version,
                "headGroupSpec": {"rayStartParams": {}, "template": head},
                "workerGroupSpecs": [workers] if cluster.workers else [],
            },
        },
    }


def _pod(container: str, cluster: Cluster, *, gpus: int) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(cluster.cpus), "memory": cluster.memory}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": cluster.image,
                    "resources": {"requests": dict(resources), "limits": dict(resources)},
                }
            ]
        }
    }


def _role(meta: dict[str, Any]) -> dict[str, Any]:
    rule = {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list"]}
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": meta,
        "rules": [rule],
    }


def _role_binding(meta: dict[str, Any]) -> dict[str, Any]:
    account = {"kind": "ServiceAccount", "name": meta["name"], "namespace": meta["namespace"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": meta["name"]}
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": meta,
        "subjects": [account],
        "roleRef": role,
    }


def _cron_job(schedule: Schedule, cluster: Cluster, meta: dict[str, Any]) -> dict[str, Any]:
    container = {
        "name": "night",
        "image": cluster.kubectl_image,
        "command": ["sh", f"{FOLDER}/night.sh"],
        "args": [f"app.kubernetes.io/instance={meta['name']}", f"{FOLDER}/rayjob.yaml"],
        "resources": {
            "requests": {"cpu": "10m", "memory": "64Mi"},
            "limits": {"memory": "256Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 65534,
        },
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - kubectl's cache
        "volumeMounts": [{"name": "night", "mountPath": FOLDER, "readOnly": True}],
    }
    late_s = MADE_UP_S if schedule.catch_up == "once" else int(LATE.total_seconds())
    pod = {
        "serviceAccountName": meta["name"],
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "night", "configMap": {"name": meta["name"]}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": meta,
        "spec": {
            "schedule": kubernetes_cron(schedule.cron),
            "timeZone": schedule.timezone,
            "suspend": not schedule.enabled,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": late_s,
            "successfulJobsHistoryLimit": 7,
            "failedJobsHistoryLimit": 7,
            "jobTemplate": {
                "metadata": {"labels": meta["labels"]},
                "spec": {
                    "backoffLimit": 0,
                    "template": {"metadata": {"labels": meta["labels"]}, "spec": pod},
                },
            },
        },
    }


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
