from gateway.bench.index import run


def test_a_short_run_measures_every_figure():
    figures = {figure.name: figure for figure in run(scale=0.005)}
    assert {
        "index.bytes_per_block_1m",
        "index.match_p50_ms_6250x8",
        "index.match_p50_ms_6250x64",
        "index.match_reserve_per_core",
        "index.store_blocks_per_s",
        "index.select_p99_ms_under_write",
    } <= set(figures)
    assert all(figure.value > 0 for figure in figures.values())
    memory = figures["index.bytes_per_block_1m"]
    assert memory.value < memory.reference_value / 4
