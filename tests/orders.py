"""The one order to start, and the one to end, among what a controller decided."""

from typing import Any

from orchestrator.core.decisions import EndRun, StartGeneration


def started(decisions: list[Any]) -> StartGeneration:
    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    return order


def ended(decisions: list[Any]) -> EndRun:
    (order,) = [d for d in decisions if isinstance(d, EndRun)]
    return order
