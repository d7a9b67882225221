"""What others make of the same model: the library that our numbers are compared with."""

from typing import Any

from trainer.config import ModelConfig


def llama_config(config: ModelConfig) -> Any:
    """Return the sizes as transformers wants them."""
    from transformers import LlamaConfig  # noqa: PLC0415 - seconds, for tests that need it only

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=131_072,
        rope_parameters=rope,
    )
