"""What a deployer copies: each file by the tool of its format, and none of it drifts from what `qkit serve` starts.

promtool and systemd-analyze come from no Python package; where they are installed they are asked as well.
The proxies at work: test_serve_proxies.py.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.command import tool
from helpers.paths import SERVE
from qkit.core.device import Device
from qkit.recipe.schema import Recipe, Serve
from qkit.runtimes import vllm
from qkit.serve import manifests
from qkit.serve.request import Serving
from qkit.server.adapters import Adapter

RATE_WINDOW = "5m"


def serving(**section: Any) -> Serving:
    how = Recipe.model_validate({"task": "chat", "model": {"source": "none"}, "data": {}, "serve": section})
    card = Device("cuda", "a card", 80 << 30, 8)
    return Serving("./model", "model", how, card, Path("logs"), "vllm", vllm.Extras())


def documents(name: str) -> list[Any]:
    return [document for document in yaml.safe_load_all((SERVE / name).read_text(encoding="utf-8")) if document]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- nothing drifts ---------------------------------------------------------------------------------------------------


def test_compose_and_kubernetes_hold_what_is_printed() -> None:
    assert documents("compose.yaml")[0]["services"]["vllm"] == manifests.compose_document(serving())["services"]["vllm"]
    assert documents("kubernetes/deployment.yaml") == manifests.kubernetes_documents(serving())


def test_the_limits_in_front_are_those_of_the_server() -> None:
    section, nginx, envoy = Serve(), (SERVE / "nginx.conf").read_text(), (SERVE / "envoy.yaml").read_text()
    assert f"client_max_body_size {section.max_body_bytes >> 20}m;" in nginx
    assert f"max_request_bytes: {section.max_body_bytes}" in envoy and f"max_requests: {section.max_requests}" in envoy
    assert f"server 127.0.0.1:{section.port} " in nginx and f"port_value: {section.port}" in envoy


def test_the_unit_and_ray_have_options_that_exist() -> None:
    unit = (SERVE / "qkit-serve.service").read_text()
    words = re.search(r"^ExecStart=\S+/qkit (.*)$", unit, re.MULTILINE)
    assert words
    shown = run(sys.executable, "-m", "qkit", "serve", "--help").stdout
    assert all(word in shown for word in words[1].split() if word.startswith("--"))
    engine = next(
        ast.literal_eval(node.value)
        for node in ast.parse((SERVE / "ray_serve.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENGINE"
    )
    assert engine == Serve().model_dump(include=set(engine))
    assert f"TimeoutStopSec={2 * Serve().drain_seconds}" in unit


def test_the_image_s_user_is_the_one_that_is_run() -> None:
    text = (SERVE / "Dockerfile").read_text()
    assert f"USER {manifests.USER}:{manifests.USER}" in text and f"--uid {manifests.USER}" in text


# --- metrics ----------------------------------------------------------------------------------------------------------


def expressions() -> list[str]:
    rules = [rule["expr"] for group in documents("prometheus/alerts.yml")[0]["groups"] for rule in group["rules"]]
    board = json.loads((SERVE / "grafana" / "dashboards" / "vllm.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [text.replace("$__rate_interval", RATE_WINDOW) for text in (*rules, *shown)]


def test_every_expression_is_promql() -> None:
    promql = pytest.importorskip("promql_parser")
    for text in expressions():
        promql.parse(text)
    assert len(expressions()) > 20


def test_every_metric_is_one_that_vllm_has() -> None:
    """By its source: prometheus_client adds _total to counters and _bucket to histograms."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    kinds = {name: kind for kind, name in re.findall(r"(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"", source)}
    ending = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    known = {f"{name.removesuffix('_total')}{ending[kind]}" for name, kind in kinds.items()}
    rule = (SERVE / "kubernetes" / "autoscaling-rule.yaml").read_text()
    used = set(re.findall(r"vllm:\w+", " ".join(expressions()) + rule))
    assert len(used) > 10 and used - known == set()


def test_the_autoscaler_asks_for_the_metric_that_the_rule_makes() -> None:
    rule = documents("kubernetes/autoscaling-rule.yaml")[0]["rules"]["custom"][0]
    asked = documents("kubernetes/autoscaling.yaml")[0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert rule["name"]["as"] == asked


# --- each by its own tool ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((SERVE / "kubernetes").glob("*.yaml")), ids=lambda file: file.stem)
def test_kubernetes_objects(file: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(f"kubernetes/{file.name}"):
        if file.stem != "autoscaling-rule":  # the values of a chart
            validate.validate(document, "1.35", strict=True)


def test_kubernetes_printed_for_other_settings(tiny_model: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in manifests.kubernetes_documents(serving(drain_seconds=120, max_num_seqs=16)):
        validate.validate(document, "1.35", strict=True)
    pod = manifests.kubernetes_documents(serving(drain_seconds=120))[0]["spec"]["template"]["spec"]
    live = pod["containers"][0]["livenessProbe"]
    assert live["periodSeconds"] * live["failureThreshold"] > 120 < pod["terminationGracePeriodSeconds"]


def test_adapters_are_mounted_where_the_command_looks_for_them(tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    beside = (Adapter("sql", Path("/runs/sql/train/adapter"), 16), Adapter("chat", Path("/runs/chat/train/adapter"), 8))
    made = replace(serving(), extras=vllm.Extras(beside))
    service = manifests.compose_document(made)["services"]["vllm"]
    mounted = {volume["target"]: volume["source"] for volume in service["volumes"]}
    named = dict(word.split("=", 1) for word in service["command"] if word.startswith(("sql=", "chat=")))
    assert {mounted[place] for place in named.values()} == {str(adapter.path) for adapter in beside}
    documents = manifests.kubernetes_documents(made)
    validate.validate(documents[0], "1.35", strict=True)
    pod = documents[0]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["adapters"] == "/adapters" and set(named.values()) == {"/adapters/sql", "/adapters/chat"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_kubernetes_says_nothing_that_vllm_takes_for_its_own() -> None:
    """For a Service named vllm a pod is told VLLM_PORT=tcp://..., unless it wants no such links."""
    pod = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False


def test_compose() -> None:
    pytest.importorskip("check_jsonschema")
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", SERVE / "compose.yaml")


def test_dockerfile() -> None:
    run(tool("hadolint"), SERVE / "Dockerfile")


def test_nginx() -> None:
    crossplane = pytest.importorskip("crossplane")
    parsed = crossplane.parse(str(SERVE / "nginx.conf"), check_ctx=True, check_args=True)
    assert parsed["status"] == "ok", parsed["errors"]
    assert "proxy_buffering off;" in (SERVE / "nginx.conf").read_text()


def test_prometheus_itself() -> None:
    run(tool("promtool"), "check", "config", SERVE / "prometheus" / "prometheus.yml")
    run(tool("promtool"), "test", "rules", SERVE / "prometheus" / "alerts_test.yml")


def test_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "qkit-serve.service"
    unit.write_text((SERVE / unit.name).read_text().replace("/opt/qkit/venv/bin/qkit", "/bin/true"))
    run(tool("systemd-analyze"), "verify", "--man=no", unit)


def test_yaml_and_json_are_whole() -> None:
    for file in SERVE.rglob("*.yaml"):
        assert documents(str(file.relative_to(SERVE))), file
    board = json.loads((SERVE / "grafana" / "dashboards" / "vllm.json").read_text())
    source = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
