"""Bytes of tensors, as other libraries want them."""

from __future__ import annotations

from typing import Any

import torch


def exposed(buffer: torch.Tensor) -> Any:  # noqa: ANN401 - whatever has the array interface
    """Return `buffer` as an object with the array interface of its device; nothing is copied."""
    return buffer if buffer.is_cuda else buffer.numpy()
