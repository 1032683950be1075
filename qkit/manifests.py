"""The command of `qkit serve` for where it is to run: a shell, a compose file, Kubernetes.

A container sees the model at /model, listens on all of its addresses, and has its key from a secret. The files in serve/ hold what is made
here; a test compares them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit import admission, serve
from qkit.errors import UserError
from qkit.runtimes import vllm
from qkit.serve import Serving
from qkit.server import limits

PORT = 8000
MODEL = "/model"
IMAGE = "registry.example/qkit-vllm@sha256:" + 64 * "0"  # a placeholder, which no registry takes for another image
DRAIN_FILE = "/tmp/qkit-drain"
USER = 10001  # the one in serve/Dockerfile
SETTLE_SECONDS = 5  # until load balancers have heard that a pod ends
PROBE_SECONDS = 5
SECRET = ("vllm-api-key", "key")


def shell(serving: Serving) -> str:
    """The environment and the command line, for a shell. The key is to be in VLLM_API_KEY already."""
    section = serving.how.serve
    told = {**_told(serving, Path(serving.model).exists()), **limits(section, DRAIN_FILE)}
    words = [f"{name}={shlex.quote(value)}" for name, value in told.items()]
    return " \\\n  ".join([*words, shlex.join(serve.argv(serving, section.port))])


def compose(serving: Serving) -> str:
    """A compose file with this one service."""
    return _yaml([compose_document(serving)])


def compose_document(serving: Serving) -> dict[str, Any]:
    inside, section = _inside(serving), serving.how.serve
    service: dict[str, Any] = {
        "image": IMAGE,
        "command": _command(inside),
        "environment": {**_environment(inside), admission.API_KEY: "${VLLM_API_KEY:?set it in .env}"},
        "volumes": [{"type": "bind", "source": serving.model, "target": MODEL, "read_only": True}],
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "user": f"{USER}:{USER}",
        "read_only": True,
        "tmpfs": ["/tmp:mode=1777"],
        "shm_size": "2gb",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "init": True,
        "stop_grace_period": f"{section.drain_seconds + 20}s",
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "python", "-c", f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/health')"],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{section.startup_seconds}s",
        },
        "pre_stop": [{"command": _drain()}],
    }
    if _has_gpu(serving):
        service["gpus"] = [{"count": 1, "capabilities": ["gpu"]}]
    return {"services": {"vllm": service}}


def kubernetes(serving: Serving) -> str:
    """A Deployment and its Service."""
    return _yaml(kubernetes_documents(serving))


def kubernetes_documents(serving: Serving) -> list[dict[str, Any]]:
    labels = {"app.kubernetes.io/name": "vllm"}
    meta = {"name": "vllm", "labels": labels}
    pod = {"metadata": {"labels": labels}, "spec": _pod(serving)}
    deployment = {
        "replicas": 2,
        "selector": {"matchLabels": labels},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "progressDeadlineSeconds": serving.how.serve.startup_seconds + 300,
        "template": pod,
    }
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": deployment},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": ports}},
    ]


def _pod(serving: Serving) -> dict[str, Any]:
    """Memory comes from /dev/shm for messages between vLLM's processes, and /tmp is the one place that is written to."""
    shared = {"medium": "Memory", "sizeLimit": "2Gi"}
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": SETTLE_SECONDS + serving.how.serve.drain_seconds + 20,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(serving)],
        "volumes": [
            {"name": "model", "persistentVolumeClaim": {"claimName": "model", "readOnly": True}},
            {"name": "shm", "emptyDir": shared},
            {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
        ],
    }


def _container(serving: Serving) -> dict[str, Any]:
    inside = _inside(serving)
    secret = {"secretKeyRef": {"name": SECRET[0], "key": SECRET[1]}}
    environment = [{"name": name, "value": value} for name, value in _environment(inside).items()]
    return {
        "name": "vllm",
        "image": IMAGE,
        "command": _command(inside),
        "env": [*environment, {"name": admission.API_KEY, "valueFrom": secret}],
        "ports": [{"name": "http", "containerPort": PORT}],
        **_probes(serving),
        "lifecycle": {
            "preStop": {"exec": {"command": ["sh", "-c", f"sleep {SETTLE_SECONDS}; {shlex.join(_drain())}"]}}
        },
        "resources": _resources(serving),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "model", "mountPath": MODEL, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _probes(serving: Serving) -> dict[str, Any]:
    """Nothing listens until the model is loaded: the start has a probe of its own. Liveness is patient enough to outlast a drain."""
    section, ask = serving.how.serve, {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": PROBE_SECONDS}
    every = {**ask, "periodSeconds": PROBE_SECONDS}
    patience = (SETTLE_SECONDS + section.drain_seconds) // PROBE_SECONDS + 6
    return {
        "startupProbe": {**every, "failureThreshold": -(-section.startup_seconds // PROBE_SECONDS)},
        "readinessProbe": {**every, "failureThreshold": 1},
        "livenessProbe": {**every, "failureThreshold": patience},
    }


def _resources(serving: Serving) -> dict[str, Any]:
    if _has_gpu(serving):
        return {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "32Gi", "nvidia.com/gpu": "1"}}
    made = serve.planned(serving)
    memory = f"{-(-made.peak_bytes // 2**30) + 1}Gi" if made else "16Gi"
    return {"requests": {"cpu": "4", "memory": memory}, "limits": {"memory": memory}}


# --- shared ---------------------------------------------------------------------------------------------------------------


def _has_gpu(serving: Serving) -> bool:
    return serving.device.meter != "rss"


def _inside(serving: Serving) -> Serving:
    """As the container sees it; adapters are mounted beside the model."""
    section = serving.how.serve.model_copy(update={"host": "0.0.0.0", "port": PORT})
    beside = tuple(replace(a, path=Path("/adapters") / a.name) for a in serving.extras.adapters)
    how = serving.how.model_copy(update={"serve": section})
    return replace(serving, model=MODEL, how=how, extras=replace(serving.extras, adapters=beside))


def _command(inside: Serving) -> list[str]:
    return ["python", *serve.argv(inside, PORT)[1:]]


def _environment(inside: Serving) -> dict[str, str]:
    return {**_told(inside, local=True), **limits(inside.how.serve, DRAIN_FILE), "HOME": "/tmp"}


def _told(serving: Serving, local: bool) -> dict[str, str]:
    """Of vLLM's environment all but the key."""
    told = vllm.environment(serving.device, serving.extras, local) if serving.runtime == "vllm" else {}
    return {name: value for name, value in told.items() if name != admission.API_KEY}


def _drain() -> Sequence[str]:
    return ["python", "-m", "qkit.admission", f"http://127.0.0.1:{PORT}"]


def _yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    import yaml

    return "---\n".join(yaml.dump(document, Dumper=_plain(), sort_keys=False, width=120) for document in documents)


def _plain() -> Any:
    """A dumper that writes a value out again where it is used twice: `*id001` is for no human reader."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Plain


FORMS: Mapping[str, Callable[[Serving], str]] = {"shell": shell, "compose": compose, "kubernetes": kubernetes}


def rendered(form: str, serving: Serving) -> str:
    """The command in one of FORMS.

    Raises:
        UserError: there is no such form.
    """
    if form not in FORMS:
        raise UserError(f"--print {form}: there are {', '.join(FORMS)}")
    return FORMS[form](serving)
