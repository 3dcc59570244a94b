"""What a simulated engine does wrong on purpose: the ways in which a fleet loses its hits in silence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from kvindex.worker import Worker


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-events", action="store_true", help="KV events are off")
    parser.add_argument("--ignore-salt", action="store_true", help="events do not carry the cache salt")
    parser.add_argument("--ignore-lora", action="store_true", help="events do not carry the LoRA name")
    parser.add_argument("--foreign-events", action="store_true", help="events of another engine's prompts")
    parser.add_argument("--event-delay-s", type=float, default=0, help="events come late")
    parser.add_argument("--no-prefix-caching", action="store_true", help="as vLLM's metrics then say")
    parser.add_argument("--no-tokenize", action="store_true", help="/tokenize is not served")
    parser.add_argument("--chat-template", type=Path, help="a template that the gateway does not know of")
    parser.add_argument("--answers", type=int, help="requests that are answered; the next ones hang for ever")
    parser.add_argument("--registered-block-size", type=int, help="other than the engine's own")
    parser.add_argument("--registered-model", help="other than the name that is served")


def distorted(options: argparse.Namespace, event: Any) -> Any:
    """Return what is published instead of `event`; None: nothing."""
    if options.no_events or options.no_prefix_caching:
        return None
    if type(event).__name__ != "BlockStored":
        return event
    if options.ignore_salt:
        event = _without_salt(event)
    if options.ignore_lora:
        event = _without_lora(event)
    if options.foreign_events:
        event = msgspec.structs.replace(event, token_ids=[token + 1 for token in event.token_ids])
    return event


def registered(options: argparse.Namespace, worker: Worker) -> Worker:
    """Return `worker` as it registers."""
    return msgspec.structs.replace(
        worker,
        model=options.registered_model or worker.model,
        block_size=options.registered_block_size or worker.block_size,
    )


def _without_salt(event: Any) -> Any:
    kept = [tuple(key for key in keys or () if key == event.lora_name) or None for keys in event.extra_keys]
    return msgspec.structs.replace(event, extra_keys=kept)


def _without_lora(event: Any) -> Any:
    kept = [tuple(key for key in keys or () if key != event.lora_name) or None for keys in event.extra_keys]
    return msgspec.structs.replace(event, lora_name=None, lora_id=None, extra_keys=kept)
