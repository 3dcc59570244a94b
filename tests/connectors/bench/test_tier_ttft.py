"""What is made of times that an engine took."""

from connectors.bench.tier_ttft import figures


def test_figures():
    short = {"computed": [10.0, 12.0, 90.0], "cpu": [11.0] * 3, "disk": [30.0] * 3}
    long = {"computed": [100.0] * 3, "cpu": [20.0] * 3, "disk": [120.0] * 3}
    found = {each.name: each for each in figures({288: short, 544: long})}
    assert found["tiers.ttft_ms_288_computed"].value == 12.0
    loaded = found["tiers.ttft_ms_544_cpu"]
    assert (loaded.value, loaded.reference_value) == (20.0, 100.0)
    assert found["tiers.crossover_tokens_cpu"].value == 288
    assert "tiers.crossover_tokens_disk" not in found
