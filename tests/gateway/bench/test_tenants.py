from gateway.bench.tenants import run


def test_every_size_is_measured_beside_its_reference():
    figures = run(scale=0.01)
    assert [figure.name.removeprefix("tenants.gate_ms_") for figure in figures] == [
        "2kb",
        "400kb",
        "400kb_tokens",
    ]
    assert all(figure.value > 0 and figure.reference_value > 0 for figure in figures)
