import subprocess

import pytest
import yaml

from gateway.envoy import WORKERS, EnvoyOptions, LbPolicy, bootstrap, to_yaml
from tests.support.envoy import ENVOY

FIXED = EnvoyOptions(
    listen="[::]:8080", gateways=("gateway-1:9002", "gateway-2:9002"), workers=("10.0.0.1:8000",)
)
ROUND_ROBIN = EnvoyOptions(ext_proc=False, lb_policy=LbPolicy.ROUND_ROBIN)


def cluster(options, name=WORKERS):
    clusters = bootstrap(options)["static_resources"]["clusters"]
    return next(each for each in clusters if each["name"] == name)


def policy(options):
    (only,) = cluster(options)["load_balancing_policy"]["policies"]
    return only["typed_extension_config"]


@pytest.mark.envoy
@pytest.mark.parametrize("options", [EnvoyOptions(), EnvoyOptions(fail_open=False), FIXED, ROUND_ROBIN])
def test_envoy_accepts_it(tmp_path, options):
    file = tmp_path / "envoy.yaml"
    file.write_text(to_yaml(bootstrap(options)))
    command = [ENVOY, "--mode", "validate", "-c", file, "-l", "error"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_yaml_says_the_same():
    assert yaml.safe_load(to_yaml(bootstrap(FIXED))) == bootstrap(FIXED)


def test_workers_come_from_the_gateway_unless_they_are_fixed():
    assert cluster(EnvoyOptions())["type"] == "EDS"
    fixed = cluster(FIXED)
    assert fixed["type"] == "STATIC"
    (locality,) = fixed["load_assignment"]["endpoints"]
    socket = {"address": "10.0.0.1", "port_value": 8000}
    assert locality["lb_endpoints"] == [{"endpoint": {"address": {"socket_address": socket}}}]


def test_pick_comes_first_and_the_policy_is_its_fallback():
    config = policy(EnvoyOptions())["typed_config"]
    (source,) = config["override_host_sources"]
    assert source["metadata"]["key"] == "envoy.lb"
    (fallback,) = config["fallback_policy"]["policies"]
    assert fallback["typed_extension_config"]["name"].endswith("least_request")
    assert policy(ROUND_ROBIN)["name"].endswith("round_robin")


@pytest.mark.parametrize("field", ["listen", "admin"])
def test_wrong_address_is_named(field):
    with pytest.raises(ValueError, match="'nowhere'"):
        bootstrap(EnvoyOptions(**{field: "nowhere"}))
