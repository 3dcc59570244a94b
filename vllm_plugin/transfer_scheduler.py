"""Transfers as the scheduler sees them: which requests are sent, which are received, and how far they are.

On the engine's thread, between two steps. Touches no KV and no network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from connectors.errors import ProtocolError
from connectors.params import TransferParams, parse_params
from vllm_plugin import compat
from vllm_plugin.metadata import Computed, KvlaneMetadata, Receive, Send

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_log = structlog.get_logger(__name__)


@dataclass
class _Sending:
    send: Send
    block_ids: list[int] = field(default_factory=list)
    is_open: bool = False
    """Whether the workers know of it."""


class TransferScheduler:
    """The scheduler's part of every transfer of one engine rank."""

    def __init__(self) -> None:
        self._sending: dict[str, _Sending] = {}
        self._unopened: list[_Sending] = []
        self._receiving: dict[str, TransferParams] = {}
        """Requests whose blocks are being filled, or were."""
        self._next = KvlaneMetadata()

    def on_new_request(self, request: Request) -> None:
        """Note a request, if it is to be sent."""
        params = self._params(request)
        if params is not None and params.role == "send":
            send = Send(request.request_id, params.transfer_id, request.num_prompt_tokens)
            sending = self._sending[request.request_id] = _Sending(send)
            self._unopened.append(sending)

    def num_external_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """Return how many tokens after the first `num_computed_tokens` another engine will send."""
        if request.request_id in self._receiving:
            return 0  # they came, or did not: what is missing now is computed here
        params = self._params(request)
        if params is None or params.role != "receive":
            return 0
        return max(0, int(request.num_prompt_tokens) - num_computed_tokens)

    def on_alloc(self, request: Request, block_ids: list[int], num_external_tokens: int) -> None:
        """Have a request's blocks filled, now that it has them."""
        if not num_external_tokens or request.request_id in self._receiving:
            return
        params = self._params(request)
        if params is None or params.role != "receive":
            return  # another place has promised them
        self._receiving[request.request_id] = params
        num_tokens = int(request.num_prompt_tokens)
        self._next.receives.append(
            Receive(request.request_id, params, block_ids, num_tokens - num_external_tokens, num_tokens)
        )

    def build_metadata(self, output: SchedulerOutput) -> KvlaneMetadata:
        """Return what the workers need to know of a step, and begin the next.

        A request that is to be sent is named before it is scheduled: its receiver may ask for it by then.
        """
        metadata, self._next = self._next, KvlaneMetadata()
        for sending in self._unopened:
            sending.is_open = True
            metadata.sends.append(sending.send)
        self._unopened.clear()
        for request_id in compat.preempted(output):
            if (preempted := self._sending.get(request_id)) is not None:
                metadata.suspended.append(preempted.send.transfer_id)
        for step in compat.scheduled(output):
            if (computing := self._sending.get(step.request_id)) is None:
                continue
            num_tokens, num_before = computing.send.num_tokens, 0
            if step.are_all_blocks:
                computing.block_ids = []
                num_before = step.num_computed_tokens
            computing.block_ids.extend(step.block_ids)
            metadata.computed.append(
                Computed(
                    computing.send.transfer_id,
                    list(computing.block_ids),
                    min(num_before, num_tokens),
                    min(step.num_computed_tokens + step.num_scheduled_tokens, num_tokens),
                )
            )
        return metadata

    def request_finished(self, request: Request) -> bool:
        """Note the end of a request; return whether its blocks are needed still.

        If so, the workers name it when they are not.
        """
        if (params := self._receiving.pop(request.request_id, None)) is not None:
            self._next.cancelled.append(params.transfer_id)  # of no effect if it has ended
            return False
        sending = self._sending.pop(request.request_id, None)
        if sending is None:
            return False
        if not sending.is_open:
            self._unopened.remove(sending)
        if request.num_computed_tokens < sending.send.num_tokens:
            self._next.aborted.append(sending.send.transfer_id)
        return sending.is_open

    def _params(self, request: Request) -> TransferParams | None:
        try:
            return parse_params(request.kv_transfer_params)
        except ProtocolError as error:
            _log.warning("transfer_refused", request_id=request.request_id, reason=str(error))
            return None
