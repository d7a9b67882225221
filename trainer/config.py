"""The sizes that a run file asks for, checked. No torch."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.protocol.sizes import PRESETS, ModelConfig, RopeScaling, misfits
from orchestrator.worker import MisconfiguredError

__all__ = ["PRESETS", "ModelConfig", "RopeScaling", "model_config"]
_WHERE = "spec.trainer.model"


def model_config(model: str | dict[str, Any]) -> ModelConfig:
    """Return the sizes that `spec.trainer.model` asks for, checked.

    Raises:
        MisconfiguredError: if it names no preset, or its sizes do not fit each other.
    """
    if isinstance(model, str):
        if model not in PRESETS:
            raise MisconfiguredError(
                f"{_WHERE} is {model!r}, expected one of {', '.join(PRESETS)}",
                hint="or write the sizes themselves: {dim: 128, layers: 4, ...}",
            )
        return PRESETS[model]
    try:
        config = msgspec.convert(model, ModelConfig)
    except msgspec.ValidationError as error:
        names = ", ".join(field.encode_name for field in msgspec.structs.fields(ModelConfig))
        raise MisconfiguredError(f"{_WHERE}: {error}", hint=f"fields: {names}") from error
    for message, hint in misfits(config):
        raise MisconfiguredError(f"{_WHERE}: {message}", hint=hint)
    return config
