"""The ledger: every microsecond of a run in exactly one bucket, with the incident that caused it.

It is a list of adjacent spans. Time is entered as it passes and may be re-labelled later: only
when a run falls back to step 40 is it known that what came after step 40 was lost work. Whole
microseconds are kept, so that buckets sum to the wall clock exactly, not nearly.

Training with fewer replicas counts as effective by the share of the full speed that it reaches, as
in Meta's definition of the effective training time ratio. The rest of it is lost capacity.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.core.phases import Bucket
from orchestrator.protocol.ids import IncidentId, Seconds

Speed = tuple[int, int]
"""A share of the full speed of training, as a fraction: numerator, denominator."""
FULL: Speed = (1, 1)


class Span(NamedTuple):
    """From `start_us` to the start of the next span (the last: to the ledger's end)."""

    start_us: int
    bucket: Bucket
    incident: IncidentId | None
    """Of training at less than full speed: what took the replicas that are missing."""
    speed: Speed = FULL
    """Of training only."""


_NOTHING = dict.fromkeys(Bucket, 0)


class Part(NamedTuple):
    """Time of one span in one bucket."""

    start_us: int
    us: int
    bucket: Bucket
    incident: IncidentId | None


def micros(at: Seconds) -> int:
    """Return a moment in whole microseconds."""
    return round(at * 1_000_000)


class Ledger:
    """Adjacent spans from 0 to `end_us`; no gap, no overlap."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self.end_us = 0

    def charge(
        self, until: Seconds, bucket: Bucket, incident: IncidentId | None, speed: Speed = FULL
    ) -> None:
        """Enter the time from the end of the ledger to `until`.

        Args:
            until: seconds on the run's clock.
            bucket: what it was spent on.
            incident: what caused that.
            speed: of training: the share of the full speed that it went on with.

        Raises:
            ValueError: if `until` lies before the end.
        """
        until_us = micros(until)
        if until_us < self.end_us:
            raise ValueError(f"until is {until_us} us, the ledger ends at {self.end_us} us")
        if until_us == self.end_us:
            return
        last = self._spans[-1] if self._spans else None
        if last is None or last[1:] != (bucket, incident, speed):
            self._spans.append(Span(self.end_us, bucket, incident, speed))
        self.end_us = until_us

    def relabel(
        self,
        start: Seconds,
        end: Seconds,
        bucket: Bucket,
        incident: IncidentId | None,
        *,
        only: Bucket = Bucket.EFFECTIVE,
    ) -> int:
        """Move what lies in [start, end) and is charged to `only`; return microseconds moved."""
        start_us = max(micros(start), 0)
        end_us = min(micros(end), self.end_us)
        if start_us >= end_us:
            return 0
        first = self._cut(start_us)
        last = self._cut(end_us)
        moved = 0
        for index in range(first, last):
            span = self._spans[index]
            if span.bucket is only:
                moved += self._end_of(index) - span.start_us
                self._spans[index] = Span(span.start_us, bucket, incident)
        self._merge(max(first - 1, 0), last)
        return moved

    def spans(self) -> list[Span]:
        """Return all spans, oldest first."""
        return list(self._spans)

    def totals(self, incident: IncidentId | None = None) -> dict[Bucket, int]:
        """Return microseconds per bucket, of one incident or (None) of the whole run."""
        totals = _NOTHING.copy()
        # Without `parts`: whoever checks a run at every event adds up all of it each time.
        end_us = self.end_us
        for start_us, bucket, of, speed in reversed(self._spans):
            us, end_us = end_us - start_us, start_us
            if incident is not None and of != incident:
                continue
            if speed == FULL:
                totals[bucket] += us
            else:
                whole = us * speed[0] // speed[1]
                totals[bucket] += whole
                totals[Bucket.LOST_CAPACITY] += us - whole
        return totals

    def parts(self) -> Iterator[Part]:
        """Yield how long each span was for which bucket, oldest first; in sum, the wall clock."""
        for index, span in enumerate(self._spans):
            us = self._end_of(index) - span.start_us
            done, of = span.speed
            whole = us * done // of
            yield Part(span.start_us, whole, span.bucket, span.incident)
            if whole < us:
                yield Part(span.start_us, us - whole, Bucket.LOST_CAPACITY, span.incident)

    @property
    def effective_ratio(self) -> float:
        """Effective training time ratio: effective / wall clock; 0 for an empty ledger."""
        return self.totals()[Bucket.EFFECTIVE] / self.end_us if self.end_us else 0.0

    def _end_of(self, index: int) -> int:
        return self._spans[index + 1].start_us if index + 1 < len(self._spans) else self.end_us

    def _cut(self, at_us: int) -> int:
        """Make a span start at `at_us` and return its index (one past the last for the end)."""
        if at_us >= self.end_us:
            return len(self._spans)
        index = bisect.bisect_right(self._spans, at_us, key=lambda span: span.start_us) - 1
        span = self._spans[index]
        if span.start_us == at_us:
            return index
        self._spans.insert(index + 1, span._replace(start_us=at_us))
        return index + 1

    def _merge(self, first: int, last: int) -> None:
        index = first
        while index + 1 < min(last + 1, len(self._spans)):
            here, after = self._spans[index], self._spans[index + 1]
            if here[1:] == after[1:]:
                del self._spans[index + 1]
                last -= 1
            else:
                index += 1
