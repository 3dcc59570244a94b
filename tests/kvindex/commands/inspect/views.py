"""What the admin API says of prompts."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from kvindex.blocks import pack_hashes
from kvindex.stores import Store
from kvindex.worker import Worker


def view_of_chain(holder: Worker | Store, hashes: Sequence[int], stride: int = 1) -> dict[str, object]:
    return {
        "pool_id": holder.pool.pool_id,
        "num_blocks": len(hashes) * stride,
        "stride": stride,
        "hashes": base64.b64encode(pack_hashes(hashes)).decode(),
    }


def view_of_prompt(worker: Worker, hashes: Sequence[int], **fields: object) -> dict[str, object]:
    return {"model": worker.model, "chains": [view_of_chain(worker, hashes)], **fields}
