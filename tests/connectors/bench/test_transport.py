"""Which GPU each of two measured processes gets."""

import pytest

from connectors.bench.transport import gpu_of


def test_two_processes_get_gpus_of_their_own_where_there_are_two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [gpu_of("cuda", index) for index in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpu_of("cuda", 1) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert gpu_of("cpu", 1) == {}
