"""What is made of times that an engine took."""

from connectors.bench.tier_ttft import Timed, figures


def timed(*measured_ms: float, predicted_ms: float = 15.0) -> list[Timed]:
    return [Timed(each, predicted_ms) for each in measured_ms]


def test_figures():
    short = {"computed": timed(10, 12, 90), "cpu": timed(11, 11), "disk": timed(30, 30)}
    long = {"computed": timed(100), "cpu": timed(20), "disk": timed(120, predicted_ms=90)}
    found = {each.name: each for each in figures({288: short, 544: long})}
    assert found["tiers.ttft_ms_288_computed"].value == 12.0
    loaded = found["tiers.ttft_ms_544_cpu"]
    assert (loaded.value, loaded.reference_value) == (20.0, 100.0)
    assert found["tiers.crossover_tokens_cpu"].value == 288
    assert "tiers.crossover_tokens_disk" not in found
    predicted = found["tiers.predicted_over_measured_544_disk"]
    assert (predicted.value, predicted.reference_value) == (0.75, 90)
    assert found["tiers.predicted_over_measured_288_computed"].value == 1.25
