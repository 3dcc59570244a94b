"""Label selectors: which workers a request may go to, by the labels that they registered with. Pure.

The syntax is the equality-based part of Kubernetes' label selectors, and so is what it says of missing keys:
`!=` is true of a worker without the label.

Source: kubernetes.io/docs/concepts/overview/working-with-objects/labels, "Label selectors".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import msgspec

from kvindex.worker import LABEL_NAME

LABELS_HEADER = "x-kvlane-labels"
"""A request's own selector; without it, its key's or its tenant's."""

_TERM = re.compile(
    rf"(?P<absent>!\s*)?(?P<key>{LABEL_NAME})(?:\s*(?P<relation>!=|==?)\s*(?P<value>{LABEL_NAME}|))?"
)


class _Term(msgspec.Struct, frozen=True):
    key: str
    value: str | None
    """None: any value will do."""
    is_wanted: bool

    def matches(self, labels: Mapping[str, str]) -> bool:
        has_it = self.key in labels if self.value is None else labels.get(self.key) == self.value
        return has_it is self.is_wanted


class Selector(msgspec.Struct, frozen=True):
    """What a worker's labels must be; all terms must hold. Without terms every worker matches."""

    text: str = ""
    """As it was written."""
    terms: tuple[_Term, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Say whether a worker with these labels will do."""
        return all(term.matches(labels) for term in self.terms)


ANY_LABELS = Selector()


@functools.lru_cache(maxsize=1024)
def parse_selector(text: str) -> Selector:
    """Return what `key=value`, `key!=value`, `key` (has it) and `!key`, joined by commas, select.

    Raises:
        ValueError: it is none of these; the message repeats the part that is wrong.
    """
    terms = []
    for part in text.split(","):
        found = _TERM.fullmatch(part.strip())
        if found is None or (found["absent"] and found["relation"]):
            raise ValueError(
                f"{part.strip()!r} is no condition on a label: write key=value, key!=value, key or !key, "
                "joined by commas"
            )
        is_wanted = not found["absent"] and found["relation"] != "!="
        terms.append(_Term(found["key"], found["value"], is_wanted))
    return Selector(text, tuple(terms))
