"""`kvlane inspect rates`, of an admin API that answers as told."""

import json

PROFILE = {
    "prefill_tokens_per_s": 8_123.4,
    "attention_ns_per_pair": 2.5,
    "step_ms": 6.25,
    "decode_us_per_request": 40.0,
    "decode_ns_per_token": 0.0,
}
NOTHING = {"num_measured": 0, "median_ms": None, "p90_distance_ms": None}


def answer(errors: dict[str, object]) -> dict[str, object]:
    worker = {"worker": "a:1", "model": "tiny", "source": "worker", "num_steps": 1_234, "speed": 0.9}
    return {"errors": errors, "workers": [worker | {"profile": PROFILE, "errors": errors}], "loads": []}


BUCKET = {
    "worker": "a:1",
    "store": "s3://kv",
    "tier": "object",
    "source": "measured",
    "num_loads": 1_042,
    "gb_per_s": 0.456,
    "latency_ms": 87.6,
    "slower": 1.25,
}


def test_rates_are_shown_with_their_source_and_the_error_of_predictions(inspect, admin):
    url, answers, _ = admin
    known = answer({"num_measured": 40, "median_ms": -3.25, "p90_distance_ms": 120.4})
    answers["GET", "/rates"] = (200, known)
    shown = inspect("rates", "--admin", url, COLUMNS="250").stdout
    for text in ("a:1", "worker", "1,234", "8,123", "2.50", "6.25", "0.90", "-3.2", "off by 120 ms"):
        assert text in shown
    assert json.loads(inspect("rates", "--admin", url, "--json").stdout) == known


def test_loads_are_shown_with_their_source(inspect, admin):
    url, answers, _ = admin
    memory = BUCKET | {"store": "node/cpu", "tier": "cpu", "source": "settings", "num_loads": 0}
    answers["GET", "/rates"] = (200, answer(NOTHING) | {"loads": [BUCKET, memory]})
    shown = inspect("rates", "--admin", url, COLUMNS="250").stdout
    for text in ("s3://kv", "object", "measured", "1,042", "0.46", "87.60", "1.25", "node/cpu", "settings"):
        assert text in shown


def test_what_was_never_measured_is_a_dash(inspect, admin):
    url, answers, _ = admin
    answers["GET", "/rates"] = (200, answer(NOTHING))
    shown = inspect("rates", "--admin", url, COLUMNS="250").stdout
    assert "no prediction was measured yet" in shown
    assert " - " in shown
    answers["GET", "/rates"] = (200, {"errors": NOTHING, "workers": [], "loads": []})
    assert "No worker is live" in inspect("rates", "--admin", url).stdout
