"""What `-o` may be; apart from what prints it, so that `holdfast --help` need not load that."""

from __future__ import annotations

from enum import StrEnum


class Output(StrEnum):
    """How a list is printed."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class Form(StrEnum):
    """How a report is printed."""

    TEXT = "text"
    JSON = "json"


class Told(StrEnum):
    """How what came of an experiment is printed."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"
