from __future__ import annotations

import json

from tests.support.cli import kvlane
from tests.support.recordings import DATA


def test_the_bench_tells_what_splits_change_and_where_they_begin(tmp_path):
    file = tmp_path / "figures.json"
    trace = DATA / "mooncake_conversation_head.jsonl"
    result = kvlane("bench", "split", "--scale", "0.01", "--trace", str(trace), "--json", str(file))
    assert result.returncode == 0, result.stderr
    figures = {each["name"]: each["value"] for each in json.loads(file.read_text())["figures"]}
    for case in ("mix_0.25", "mix_1.5", "trace_0.5", "trace_3"):
        for fleet in ("both", "roles"):
            assert figures[f"split.ttft_{fleet}_{case}"] > 0
            assert figures[f"split.itl_p99_{fleet}_{case}"] > 0
            assert 0 <= figures[f"split.share_{fleet}_{case}"] < 1
    assert figures["split.worst_ttft_over_whole"] < 2
    for what in ("load", "long_share", "gb_per_s"):
        begins = figures.get(f"split.begins_at_{what}")
        shares = {
            float(name.rpartition("_")[2]): value
            for name, value in figures.items()
            if name.startswith(f"split.share_at_{what}_")
        }
        assert begins == min((value for value, share in shares.items() if share >= 0.01), default=None)
