"""Run files for tests: what nearly all of them say, written once."""

from typing import Any

import yaml

NODES = {"count": 2, "ranksPerNode": 2, "spares": 1}
PARALLELISM = {"dpReplicate": 2, "dpShard": 2}


def head(name: str = "demo") -> str:
    """Return what comes before the spec."""
    return f"apiVersion: holdfast.dev/v1alpha1\nkind: TrainingRun\nmetadata: {{name: {name}}}\n"


def fields(name: str = "demo", **sections: Any) -> dict[str, Any]:
    """Return a run file of 2 nodes of 2 ranks, 2 replicas, 1 spare, but for what is given."""
    spec = {"nodes": {**NODES}, "parallelism": {**PARALLELISM}, **sections}
    return {**yaml.safe_load(head(name)), "spec": spec}


def text(name: str = "demo", **sections: Any) -> str:
    """Return the same as YAML, a section a line, so that a test may change or add one."""
    spec = fields(name, **sections)["spec"]
    return "".join([head(name), "spec:\n", *(_line(key, value) for key, value in spec.items())])


def _line(key: str, value: Any) -> str:
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return f"  {key}: {flow.strip()}\n"
