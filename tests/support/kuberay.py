"""What KubeRay's RayJob and RayCronJob accept, as far as the manifests in deploy/ use it: nothing else is allowed.

Written from the types of its API, version ray.io/v1 (KubeRay 1.6). Pod templates are Kubernetes' own.
"""

from __future__ import annotations

from typing import Any


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_TEXT, _COUNT, _YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_START_PARAMETERS = {"type": "object", "additionalProperties": _TEXT}
_TEMPLATE = _object({"spec": {"type": "object"}}, {"metadata": {"type": "object"}})
_CLUSTER = _object(
    {"headGroupSpec": _object({"rayStartParams": _START_PARAMETERS, "template": _TEMPLATE})},
    {
        "rayVersion": _TEXT,
        "authOptions": _object({}, {"mode": {"enum": ["disabled", "token"]}}),
        "enableInTreeAutoscaling": _YES_NO,
        "workerGroupSpecs": {
            "type": "array",
            "items": _object(
                {
                    "groupName": _TEXT,
                    "minReplicas": _COUNT,
                    "maxReplicas": _COUNT,
                    "rayStartParams": _START_PARAMETERS,
                    "template": _TEMPLATE,
                },
                {"replicas": _COUNT, "numOfHosts": _COUNT},
            ),
        },
    },
)
_JOB = _object(
    {"entrypoint": _TEXT, "rayClusterSpec": _CLUSTER},
    {
        "activeDeadlineSeconds": _COUNT,
        "backoffLimit": _COUNT,
        "jobId": _TEXT,
        "metadata": _START_PARAMETERS,
        "runtimeEnvYAML": _TEXT,
        "shutdownAfterJobFinishes": _YES_NO,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        "suspend": _YES_NO,
        "ttlSecondsAfterFinished": _COUNT,
    },
)
_NAMED = {"apiVersion": {"const": "ray.io/v1"}, "metadata": _object({"name": _TEXT})}

SCHEMAS = {
    "RayJob": _object({**_NAMED, "kind": {"const": "RayJob"}, "spec": _JOB}),
    "RayCronJob": _object(
        {
            **_NAMED,
            "kind": {"const": "RayCronJob"},
            "spec": _object({"jobTemplate": _JOB, "schedule": _TEXT}, {"suspend": _YES_NO}),
        }
    ),
}
