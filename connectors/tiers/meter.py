"""How fast a tier gives back what it holds, measured in LMCache's server: by loads, by probes without any."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from connectors.pace import Moved, Pace
from connectors.tiers import metrics

PROBE_INTERVAL_S = 60.0
"""A tier from which nothing was loaded for so long is probed: plans leave a slow one alone, and then nobody
else would notice that it is fast again. Before anybody loads, it shows how fast the tier is."""

PROBE_SIZES = (1, 4)
"""Objects read at a time, in turn: two sizes, or latency and bandwidth would not be told apart."""


class Scratch:
    """Memory that an adapter can load an object into, as if it were LMCache's."""

    def __init__(self, num_bytes: int) -> None:
        self._buffer = (ctypes.c_char * num_bytes)()

    @property
    def byte_array(self) -> memoryview:
        """The memory itself."""
        return memoryview(self._buffer).cast("B")

    @property
    def data_ptr(self) -> int:
        """Its address."""
        return ctypes.addressof(self._buffer)


class LoadMeter:
    """Learns from loads what the next will take; any thread may ask and tell.

    Args:
        tier: disk or s3.
        probe: reads up to so many objects of the tier, whichever, and tells `observe`. Called on a thread of
            the meter's once `start` was.
        interval_s: time without loads after which the tier is probed.
        clock: seconds.
    """

    def __init__(
        self,
        tier: str,
        probe: Callable[[int], None],
        interval_s: float = PROBE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = Pace(clock)
        self._probe = probe
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._observed_at_s: float | None = None
        self._bytes = metrics.LOADED_BYTES.labels(tier)
        self._seconds = metrics.LOAD_SECONDS.labels(tier)
        self._probes = metrics.PROBES.labels(tier)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{tier}-tier-probe", daemon=True)

    def start(self) -> None:
        """Begin to probe; at once, since nothing is known yet. Once."""
        self._thread.start()

    def stop(self) -> None:
        """End probing. Idempotent; waits for a probe under way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Take a load into account that has brought so many bytes."""
        if num_bytes <= 0:
            return
        with self._lock:
            self._observed_at_s = self._clock()
            self._pace.observe(Moved(num_bytes, seconds))
        self._bytes.inc(num_bytes)
        self._seconds.inc(seconds)

    def status(self) -> dict[str, Any]:
        """Return what is known, as the server's `/status` shows it (`kvindex.tiers.server.read_speeds`)."""
        with self._lock:
            line = self._pace.line()
            num_loads = self._pace.num_observed
        return {"num_loads": num_loads, "gb_per_s": line.gb_per_s, "latency_ms": line.latency_ms}

    def _run(self) -> None:
        for num_objects in itertools.cycle(PROBE_SIZES):
            while (left_s := self._left_s()) > 0:
                if self._stopping.wait(left_s):
                    return
            self._probes.inc()
            self._probe(num_objects)
            # A tier that has nothing, or fails, is asked again after a pause as well.
            if self._left_s() <= 0 and self._stopping.wait(self._interval_s):
                return

    def _left_s(self) -> float:
        if self._observed_at_s is None:
            return 0.0
        return self._observed_at_s + self._interval_s - self._clock()
