"""The manifests in deploy/: valid by their schemas, and what belongs together has the same names."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gateway.config import GatewayConfig
from gateway.readiness import LIVENESS, READINESS
from kvindex.config import PublisherConfig
from tests.support.cli import kvlane
from tests.support.envoy import ENVOY

ROOT = Path(__file__).parents[2]
KUBERNETES, COMPOSE = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "compose"
SCHEMAS = ROOT / "tests" / "data" / "schemas"
NAME = "app.kubernetes.io/name"


def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / name).read_text())


def documents() -> list[dict[str, Any]]:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(
        path.name for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"
    )
    return [each for name in listed for each in yaml.safe_load_all((KUBERNETES / name).read_text())]


DOCUMENTS = documents()


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    if kind == "InferencePool":
        return jsonschema.Draft202012Validator(schema("inferencepool_v1.json"))
    defined = schema("kubernetes_1.37.json")
    (name,) = (name for name in defined["$defs"] if re.fullmatch(rf"io\.k8s\.api\..*\.{kind}", name))
    return jsonschema.Draft202012Validator(defined | {"$ref": f"#/$defs/{name}"})


def validate(document: dict[str, Any]) -> None:
    if document["kind"] == "InferencePool":
        assert document["apiVersion"] == "inference.networking.k8s.io/v1"
    validator(document["kind"]).validate(document)


def find(kind: str, name: str) -> dict[str, Any]:
    (found,) = (each for each in DOCUMENTS if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod template of each Deployment by the value of its name label."""
    templates = [each["spec"]["template"] for each in DOCUMENTS if each["kind"] == "Deployment"]
    return {each["metadata"]["labels"][NAME]: each["spec"] for each in templates}


def selectors(node: object) -> Iterator[str]:
    """Yield every value of the name label that anything selects by."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == NAME:
                yield value
            elif key == "matchExpressions":
                yield from (name for each in value if each["key"] == NAME for name in each["values"])
            else:
                yield from selectors(value)
    elif isinstance(node, list):
        for each in node:
            yield from selectors(each)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_document_is_valid(document):
    validate(document)
    broken = copy.deepcopy(document)
    broken["spec" if "spec" in document else "metadata"]["no_such_field"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


def test_the_pool_is_of_the_workers_and_its_picker_is_the_gateway():
    pool = find("InferencePool", "kvlane")["spec"]
    (container,) = pods()[pool["selector"]["matchLabels"][NAME]]["containers"]
    ports = [port["containerPort"] for port in container["ports"]]
    assert [each["number"] for each in pool["targetPorts"]] == ports
    assert f"$(POD_IP):{ports[0]}" in [each.get("value") for each in container["env"]]
    picker = pool["endpointPickerRef"]
    (port,) = find("Service", picker["name"])["spec"]["ports"]
    assert port["port"] == picker["port"]["number"]


def test_services_budgets_and_policies_select_pods_that_exist():
    assert set(selectors(DOCUMENTS)) == set(pods())
    for name, pod in pods().items():
        named = {port["name"]: port["containerPort"] for each in pod["containers"] for port in each["ports"]}
        services = [
            each for each in DOCUMENTS if each["kind"] == "Service" and each["spec"]["selector"][NAME] == name
        ]
        for service in services:
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(named)
        policy = find("NetworkPolicy", name)
        allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert allowed == set(named.values())


def test_settings_exist_and_probes_ask_for_services_that_exist():
    (gateway,) = pods()["kvlane-gateway"]["containers"]
    file = yaml.safe_load(find("ConfigMap", "kvlane-gateway")["data"]["kvlane.yaml"])
    config = GatewayConfig(**file)
    assert config.listen.endswith(":9002")
    assert config.stop_grace_s < pods()["kvlane-gateway"]["terminationGracePeriodSeconds"]
    assert {gateway[probe]["grpc"]["service"] for probe in ("startupProbe", "livenessProbe")} == {LIVENESS}
    assert gateway["readinessProbe"]["grpc"]["service"] in READINESS
    for pod, settings in (("kvlane-gateway", GatewayConfig), ("kvlane-worker", PublisherConfig)):
        (container,) = pods()[pod]["containers"]
        check_settings([each["name"] for each in container["env"]], settings)
        keys = [each["valueFrom"]["secretKeyRef"] for each in container["env"] if "secretKeyRef" in str(each)]
        assert all(key["key"] in find("Secret", key["name"])["stringData"] for key in keys)


def check_settings(variables: list[str], settings: type) -> None:
    for name in variables:
        if name.startswith("KVLANE_"):
            assert name.removeprefix("KVLANE_").lower() in settings.model_fields


def test_compose_file_is_valid_and_starts_what_exists():
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    check = jsonschema.Draft7Validator(schema("compose.json")).validate
    check(compose)
    with pytest.raises(jsonschema.ValidationError):
        check({**compose, "services": {"envoy": {"imagine": "x"}}})
    services = compose["services"]
    for name in ("gateway-1", "gateway-2"):
        check_settings(list(services[name]["environment"]), GatewayConfig)
    check_settings(list(services["worker"]["environment"]), PublisherConfig)
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        if "build" in service:
            context = (COMPOSE / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file()


def test_envoys_bootstrap_is_what_kvlane_envoy_prints(tmp_path):
    readme = (COMPOSE / "README.md").read_text()
    command = re.search(r"^    kvlane (envoy [^>]*)>", readme, re.MULTILINE | re.DOTALL)
    printed = kvlane(*command[1].replace("\\", " ").split())
    assert printed.stdout == (COMPOSE / "envoy.yaml").read_text()
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    hosts = set(re.findall(r"address: ([a-z]+-\d)", printed.stdout))
    assert hosts == {name for name in services if name.startswith("gateway")}


@pytest.mark.envoy
def test_envoy_accepts_the_bootstrap():
    command = [ENVOY, "--mode", "validate", "-c", COMPOSE / "envoy.yaml"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "OK" in checked.stdout + checked.stderr


def test_dockerfiles_install_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for file in (ROOT / "deploy" / "images").glob("*.Dockerfile"):
        text = file.read_text()
        assert "COPY . /src" in text
        assert set(re.findall(r"/src\[(\w+)\]", text)) <= set(extras)
