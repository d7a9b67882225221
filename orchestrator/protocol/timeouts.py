"""Every timeout of the system, derived from one number and checked to be in order.

Rivals ship a dozen independent timeouts, most of them off or ten times too long, and users find
a working order by trial over days. Here the user says `detectWithin`; the rest follows, is
validated when the run starts, and is printed by `holdfast describe run`.
"""

from __future__ import annotations

import msgspec

DETECT_WITHIN_MIN_S = 0.5
DETECT_WITHIN_MAX_S = 3600.0


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Spans in seconds. Built by `derive`, never by hand."""

    detect_within_s: float
    scan_s: float
    """Agents look at the beacons of their ranks this often."""
    beat_s: float
    """Agents report to the controller this often."""
    tick_s: float
    """The controller looks at its own state at least this often."""
    stopped_s: float
    """A process that the kernel shows as stopped this long, without progress, is frozen."""
    silence_s: float
    """A node not heard for this long is lost."""
    hang_s: float
    """Standing still longer than this plus two p99 steps is a hang."""
    abort_s: float
    """A survivor that has not left its world this long after being told is killed."""
    terminate_s: float
    """Between SIGTERM and SIGKILL."""
    kill_s: float
    """A process still there this long after SIGKILL makes its node unusable."""
    form_s: float
    """No phase of a recovery is stuck before this, however quick it has been so far."""
    reconnect_s: float
    """Longest pause between two attempts of an agent to reach the controller."""
    persist_s: float
    """At the end, ranks wait this long for the last state to become durable."""
    warmup_s: float
    """Starting, restoring, compiling and saving may stand still this long."""
    save_s: float
    """A checkpoint not complete after this is abandoned; training does not wait for it."""
    commit_s: float
    """A commit that the store has not answered by then counts as failed, and is tried again."""
    collective_s: float
    """Back-stop inside the communication library; must never be the one that fires."""

    def table(self) -> list[tuple[str, float, str]]:
        """Return (name, seconds, how it follows), in the order in which they must lie."""
        return [(name, getattr(self, name), rule) for name, rule in _RULES]


_RULES = (
    ("scan_s", "detectWithin / 200, within 10 and 50 ms"),
    ("beat_s", "detectWithin / 10, within 50 ms and 2 s"),
    ("tick_s", "one beat"),
    ("stopped_s", "detectWithin / 2"),
    ("silence_s", "0.6 detectWithin; at least 4 beats"),
    ("hang_s", "0.6 detectWithin, plus two p99 steps as they are learned"),
    ("abort_s", "detectWithin / 5, within 0.5 and 5 s"),
    ("terminate_s", "detectWithin / 5, within 0.5 and 5 s"),
    ("kill_s", "detectWithin / 2, at least 2 s"),
    ("form_s", "detectWithin, at least 5 s"),
    ("reconnect_s", "half of silence_s, at most 2 s"),
    ("persist_s", "0.8 warmup_s"),
    ("warmup_s", "detection.warmupLimit; at least 2 detectWithin"),
    ("save_s", "6 detectWithin, at least 30 s"),
    ("commit_s", "half of save_s, at most half of warmup_s"),
    ("collective_s", "twice the longest of all others, at least 10 min"),
)


def derive(detect_within_s: float, warmup_s: float) -> Timeouts:
    """Return every timeout that follows from "detect within `detect_within_s`".

    Args:
        detect_within_s: the user's promise to themselves, seconds, 0.5 to 3600.
        warmup_s: the longest that starting, restoring or compiling may stand still, seconds.

    Raises:
        ValueError: if the number is out of range, or what follows from it is out of order.
    """
    d = detect_within_s
    if not DETECT_WITHIN_MIN_S <= d <= DETECT_WITHIN_MAX_S:
        raise ValueError(
            f"detectWithin is {d:g} s, "
            f"expected {DETECT_WITHIN_MIN_S:g} s to {DETECT_WITHIN_MAX_S:g} s"
        )
    beat = _within(d / 10, 0.05, 2.0)
    silence = max(0.6 * d, 4 * beat)
    warmup = max(warmup_s, 2 * d)
    save = max(6 * d, 30.0)
    timeouts = Timeouts(
        detect_within_s=d,
        scan_s=_within(d / 200, 0.01, 0.05),
        beat_s=beat,
        tick_s=beat,
        stopped_s=d / 2,
        silence_s=silence,
        hang_s=0.6 * d,
        abort_s=_within(d / 5, 0.5, 5.0),
        terminate_s=_within(d / 5, 0.5, 5.0),
        kill_s=max(d / 2, 2.0),
        form_s=max(d, 5.0),
        reconnect_s=min(silence / 2, 2.0),
        persist_s=0.8 * warmup,
        warmup_s=warmup,
        save_s=save,
        commit_s=min(save, warmup) / 2,
        collective_s=max(2 * max(warmup, save, d), 600.0),
    )
    validate(timeouts)
    return timeouts


def validate(t: Timeouts) -> None:
    """Check that every timeout leaves room for those it relies on.

    Raises:
        ValueError: naming the first two that are out of order and why they must not be.
    """
    for shorter, longer, why in (
        ("scan_s", "beat_s", "a beat would repeat an old look"),
        ("tick_s", "silence_s", "silence would be noticed late"),
        ("beat_s", "stopped_s", "one beat would decide"),
        ("beat_s", "silence_s", "one late beat would lose a node"),
        ("reconnect_s", "silence_s", "a node would be lost while it waits to reconnect"),
        ("stopped_s", "detect_within_s", "the promise would be broken"),
        ("silence_s", "detect_within_s", "the promise would be broken"),
        ("hang_s", "detect_within_s", "the promise would be broken"),
        ("detect_within_s", "warmup_s", "announced patience would be shorter than none"),
        ("persist_s", "warmup_s", "a rank that waits for its last save would look hung"),
        ("form_s", "collective_s", "the library would give up before the controller decides"),
        ("warmup_s", "collective_s", "the library would give up before the controller decides"),
        ("commit_s", "save_s", "the last commit of a run would not be tried again"),
        ("commit_s", "warmup_s", "a search that waits for a commit would be given up first"),
        ("save_s", "collective_s", "the library would give up before the controller decides"),
    ):
        if not getattr(t, shorter) < getattr(t, longer):
            raise ValueError(
                f"{shorter} is {getattr(t, shorter):g} s and {longer} is {getattr(t, longer):g} s, "
                f"expected {shorter} < {longer}: {why}"
            )


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


DEFAULTS = derive(10.0, 600.0)
"""Bounds for agents to go by before a controller has said which."""
