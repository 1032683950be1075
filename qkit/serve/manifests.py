"""`qkit serve --print`: the server's command for a shell, as a compose file, or as Kubernetes manifests.

A container sees the model at /model, listens on all of its addresses, and gets its key from a secret. The files in serve/ contain the output
of this module; a test compares them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.core.errors import NotDeployable, UserError
from qkit.core.sources import cache_dir, is_hub_id
from qkit.runtimes import vllm
from qkit.serve import fits, lifecycle
from qkit.serve.request import Serving
from qkit.server import admission
from qkit.server.lora import is_adapter
from qkit.server.process import LOOPBACK, limits

PORT = 8000
MODEL, ADAPTERS = "/model", "/adapters"
IMAGE = "registry.example/qkit-vllm@sha256:" + 64 * "0"  # a placeholder that cannot name another image
DRAIN_FILE = "/tmp/qkit-drain"
USER = 10001  # as in serve/Dockerfile
SETTLE_SECONDS = 5  # until load balancers have noticed that a pod ends
PROBE_SECONDS = 5
SECRET = ("vllm-api-key", "key")


def shell(serving: Serving) -> str:
    """The environment and the command line, for a shell. It expects the key in VLLM_API_KEY, and beyond loopback does not start without one."""
    section = serving.section
    drain_file = cache_dir() / f"drain-{section.port}"  # other users cannot write to this folder
    variables = {**_variables(serving, Path(serving.model).exists()), **limits(section, drain_file)}
    assignments = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    key = [] if section.host in LOOPBACK else [f'{admission.API_KEY}="${{{admission.API_KEY}:?set it to the API key}}"']
    return " \\\n  ".join([*key, *assignments, shlex.join(lifecycle.argv(serving, section.port))])


def compose(serving: Serving) -> str:
    """A compose file with the server as its only service."""
    return _yaml([compose_document(serving)])


def compose_document(serving: Serving) -> dict[str, Any]:
    inside, section = _inside(serving), serving.section
    mounted = {serving.model: MODEL, **{str(a.path): f"{ADAPTERS}/{a.name}" for a in serving.extras.adapters}}
    service: dict[str, Any] = {
        "image": IMAGE,
        "command": _command(inside),
        "environment": {**_environment(inside), admission.API_KEY: "${VLLM_API_KEY:?set it in .env}"},
        "volumes": [{"type": "bind", "source": a, "target": b, "read_only": True} for a, b in mounted.items()],
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
    if serving.device.has_gpu:
        service["gpus"] = [{"count": 1, "capabilities": ["gpu"]}]
    return {"services": {"vllm": service}}


def kubernetes(serving: Serving) -> str:
    """A Deployment and its Service."""
    return _yaml(kubernetes_documents(serving))


def kubernetes_documents(serving: Serving) -> list[dict[str, Any]]:
    labels = {"app.kubernetes.io/name": "vllm"}
    meta = {"name": "vllm", "labels": labels}
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT), "prometheus.io/path": "/metrics"}
    pod = {"metadata": {"labels": labels, "annotations": scraped}, "spec": _pod(serving)}
    deployment = {
        "replicas": 2,
        "selector": {"matchLabels": labels},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "progressDeadlineSeconds": serving.section.startup_seconds + 300,
        "template": pod,
    }
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": deployment},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": ports}},
    ]


def _pod(serving: Serving) -> dict[str, Any]:
    """vLLM's processes exchange messages through /dev/shm, and /tmp is the only writable folder."""
    shared = {"medium": "Memory", "sizeLimit": "2Gi"}
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # otherwise VLLM_PORT holds the Service's address, which vLLM parses as a number
        "terminationGracePeriodSeconds": SETTLE_SECONDS + serving.section.drain_seconds + 20,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(serving)],
        "volumes": [
            *(
                {"name": name, "persistentVolumeClaim": {"claimName": name, "readOnly": True}}
                for name in _claims(serving)
            ),
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
            *({"name": name, "mountPath": place, "readOnly": True} for name, place in _claims(serving).items()),
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _probes(serving: Serving) -> dict[str, Any]:
    """Nothing listens until the model is loaded, so there is a startup probe. The liveness probe waits longer than a drain takes."""
    section, probe = serving.section, {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": PROBE_SECONDS}
    every = {**probe, "periodSeconds": PROBE_SECONDS}
    patience = (SETTLE_SECONDS + section.drain_seconds) // PROBE_SECONDS + 6
    return {
        "startupProbe": {**every, "failureThreshold": -(-section.startup_seconds // PROBE_SECONDS)},
        "readinessProbe": {**every, "failureThreshold": 1},
        "livenessProbe": {**every, "failureThreshold": patience},
    }


def _resources(serving: Serving) -> dict[str, Any]:
    if serving.device.has_gpu:
        return {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "32Gi", "nvidia.com/gpu": "1"}}
    plan = fits.planned(serving)
    memory = f"{-(-plan.peak_bytes // 2**30) + 1}Gi" if plan else "16Gi"
    return {"requests": {"cpu": "4", "memory": memory}, "limits": {"memory": memory}}


# --- shared ---------------------------------------------------------------------------------------------------------------


def _claims(serving: Serving) -> dict[str, str]:
    """The volume claims of a pod, and where they are mounted. The claim of adapters has a folder for each, named like the adapter."""
    return {"model": MODEL, **({"adapters": ADAPTERS} if serving.extras.adapters else {})}


def _inside(serving: Serving) -> Serving:
    """The same server with the paths and the address of the container; adapters are mounted next to the model.

    Raises:
        NotDeployable: the container would not contain what is served.
    """
    if why := _not_inside(serving):
        raise NotDeployable(f"{serving.model}: {why}; `--print shell` prints the command for this machine")
    section = serving.section.model_copy(update={"host": "0.0.0.0", "port": PORT})
    mounted = tuple(replace(a, path=Path(ADAPTERS) / a.name) for a in serving.extras.adapters)
    recipe = serving.recipe.model_copy(update={"serve": section})
    return replace(serving, model=MODEL, recipe=recipe, extras=replace(serving.extras, adapters=mounted))


def _not_inside(serving: Serving) -> str | None:
    """Why the image of serve/Dockerfile with a mounted folder cannot serve this, or None if it can."""
    if serving.runtime != "vllm":
        return f"the image of serve/Dockerfile contains vLLM, but not what --runtime {serving.runtime} needs"
    if is_adapter(Path(serving.model)):
        return "this is an adapter, which is served with its base: give the base as the target, and the adapter with --adapter NAME=RUN"
    if is_hub_id(serving.model) and not Path(serving.model).is_dir():
        return f"the model is on the hub, and a container needs a folder: run `hf download {serving.model} --local-dir model` and serve that"
    return None


def _command(inside: Serving) -> list[str]:
    return ["python", *lifecycle.argv(inside, PORT)[1:]]


def _environment(inside: Serving) -> dict[str, str]:
    return {**_variables(inside, local=True), **limits(inside.section, DRAIN_FILE), "HOME": "/tmp"}


def _variables(serving: Serving, local: bool) -> dict[str, str]:
    """vLLM's environment variables, without the key."""
    variables = vllm.environment(serving.device, serving.extras, local) if serving.runtime == "vllm" else {}
    return {name: value for name, value in variables.items() if name != admission.API_KEY}


def _drain() -> Sequence[str]:
    return ["python", "-m", "qkit.admission", f"http://127.0.0.1:{PORT}"]


def _yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    import yaml

    return "---\n".join(yaml.dump(document, Dumper=_plain(), sort_keys=False, width=120) for document in documents)


def _plain() -> Any:
    """A dumper that repeats a value that is used twice: people cannot read `*id001`."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Plain


FORMS: Mapping[str, Callable[[Serving], str]] = {"shell": shell, "compose": compose, "kubernetes": kubernetes}


def rendered(form: str, serving: Serving) -> str:
    """The command in one of FORMS.

    Raises:
        UserError: `form` is unknown.
    """
    if form not in FORMS:
        raise UserError(f"--print {form}: must be one of {', '.join(FORMS)}")
    return FORMS[form](serving)
