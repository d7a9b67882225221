"""What the weights of a Llama 3 are called: here, by Hugging Face, and in Meta's release.

Three things differ besides names. Hugging Face turns the two *halves* of a head against each other
where we and Meta turn neighbours, so that the rows of its query and key matrices stand in another
order. Meta's release is cut for tensor parallelism. Small models of both share embedding and head.
"""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.protocol.sizes import Shape, cut_dimension
from orchestrator.protocol.sizes import weight_shapes as shapes

__all__ = [
    "EMBEDDING",
    "HEAD",
    "HUGGING_FACE",
    "META",
    "Naming",
    "Shape",
    "cut_dimension",
    "shapes",
]
HEAD, EMBEDDING = "head.weight", "embedding.weight"


class Naming(NamedTuple):
    """What one layout calls everything."""

    whole: dict[str, str]
    """What is there once, by our name."""
    layer: str
    """Where layer {n} is."""
    parts: dict[str, str]
    """What every layer has, by our name within it."""
    halves: bool
    """Whether heads are turned by halves, not by neighbouring pairs."""
    ignored: tuple[str, ...]
    """Ends of names that stand for constants, which older files have as well."""

    def theirs(self, name: str) -> str:
        """Return their name of a weight, given ours."""
        if name in self.whole:
            return self.whole[name]
        _, number, part = name.split(".", 2)
        return f"{self.layer.format(n=number)}.{self.parts[part]}"


HUGGING_FACE = Naming(
    whole={
        EMBEDDING: "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        HEAD: "lm_head.weight",
    },
    layer="model.layers.{n}",
    parts={
        "attention_norm.weight": "input_layernorm.weight",
        "attention.wq.weight": "self_attn.q_proj.weight",
        "attention.wk.weight": "self_attn.k_proj.weight",
        "attention.wv.weight": "self_attn.v_proj.weight",
        "attention.wo.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn.w1.weight": "mlp.gate_proj.weight",
        "ffn.w2.weight": "mlp.down_proj.weight",
        "ffn.w3.weight": "mlp.up_proj.weight",
    },
    halves=True,
    ignored=(".rotary_emb.inv_freq",),
)
META = Naming(
    whole={
        EMBEDDING: "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        HEAD: "output.weight",
    },
    layer="layers.{n}",
    parts={
        "attention_norm.weight": "attention_norm.weight",
        "attention.wq.weight": "attention.wq.weight",
        "attention.wk.weight": "attention.wk.weight",
        "attention.wv.weight": "attention.wv.weight",
        "attention.wo.weight": "attention.wo.weight",
        "ffn_norm.weight": "ffn_norm.weight",
        "ffn.w1.weight": "feed_forward.w1.weight",
        "ffn.w2.weight": "feed_forward.w2.weight",
        "ffn.w3.weight": "feed_forward.w3.weight",
    },
    halves=False,
    ignored=("rope.freqs",),
)


def is_rotated(name: str) -> bool:
    """Whether rotary embedding turns what comes of this weight: its order of rows counts."""
    return name.endswith((".attention.wq.weight", ".attention.wk.weight"))
