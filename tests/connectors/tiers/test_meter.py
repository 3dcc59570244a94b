"""What loads took is learned, and without loads a tier is probed. With real media: `test_stores`."""

import threading

import pytest
from prometheus_client import REGISTRY

from connectors.tiers.meter import PROBE_SIZES, LoadMeter, Scratch
from tests.support.tiers import wait_until


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(f"kvlane_store_{name}_total", {"tier": "test"}) or 0.0


def test_loads_tell_latency_and_bandwidth():
    meter = LoadMeter("test", lambda _: None)
    assert meter.status() == {"num_loads": 0, "gb_per_s": 0, "latency_ms": 0}
    before = counted("loaded_bytes"), counted("load_seconds")
    for size in (1, 4, 8):
        meter.observe(size * 10**6, 0.1 + size / 1e3)
    meter.observe(0, 20.0)  # nothing came
    status = meter.status()
    assert status["num_loads"] == 3
    assert (status["gb_per_s"], status["latency_ms"]) == (pytest.approx(1), pytest.approx(100))
    assert counted("loaded_bytes") - before[0] == 13 * 10**6
    assert counted("load_seconds") - before[1] == pytest.approx(0.313)


def test_a_tier_is_probed_at_once_and_then_whenever_nobody_loads():
    probes: list[int] = []

    def probe(num_objects: int) -> None:
        probes.append(num_objects)
        meter.observe(num_objects * 10**6, 0.1 + num_objects / 1e3)

    meter = LoadMeter("test", probe, interval_s=0.01)
    meter.start()
    wait_until(lambda: len(probes) >= 4)
    meter.stop()
    meter.stop()
    assert probes[:4] == [*PROBE_SIZES, *PROBE_SIZES]
    assert meter.status()["latency_ms"] == pytest.approx(100)
    assert not [each for each in threading.enumerate() if each.name == "test-tier-probe"]


def test_while_somebody_loads_nothing_is_probed():
    probes: list[int] = []
    meter = LoadMeter("test", probes.append, interval_s=3600)
    meter.observe(10**6, 0.1)
    meter.start()
    meter.stop()
    assert probes == []


def test_a_tier_that_has_nothing_is_asked_again_after_a_pause():
    probes: list[int] = []
    meter = LoadMeter("test", probes.append, interval_s=3600)
    meter.start()
    wait_until(lambda: probes)
    meter.stop()
    assert probes == [1]


def test_scratch_is_memory():
    scratch = Scratch(5)
    scratch.byte_array[:] = b"abcde"
    assert bytes(scratch.byte_array) == b"abcde"
    assert scratch.data_ptr
    assert len(Scratch(0).byte_array) == 0
