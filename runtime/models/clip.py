"""CLIP's text encoder, as Stable Diffusion uses it: every layer's output can be asked for.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021),
section 2.4. Parameters are named as in published checkpoints, which is how transformers 4 saved them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DEEPEST, Fields
from .layers import LayerNorm

__all__ = ["CLIPTextConfig", "CLIPTextEncoder", "rename_clip_keys"]

_DEFAULTS: dict[str, Any] = {
    "architectures": None,
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_FIXED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "add_cross_attention": (lambda value: value is False, "False"),
    "is_decoder": (lambda value: value is False, "False"),
    "is_encoder_decoder": (lambda value: value is False, "False"),
    "model_type": (lambda value: value == "clip_text_model", "'clip_text_model'"),
    "pruned_heads": (lambda value: not value, "empty"),
}
# What transformers writes into every config.json, about training, generating text or classes.
_TRANSFORMERS = """
    attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dropout dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor
    initializer_range label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache
"""


@dataclass(frozen=True)
class CLIPTextConfig:
    """The configuration of a text encoder.

    Attributes:
        vocab_size: number of tokens; ids are below it.
        hidden_size, intermediate_size: width of the residual stream and inside the feed-forward.
        num_hidden_layers, num_attention_heads: depth and heads.
        max_position_embeddings: longest sequence, in tokens.
        hidden_act: "quick_gelu" (CLIP) or "gelu" (OpenCLIP).
        layer_norm_eps: of every norm.
        eos_token_id: the token whose state is pooled. Old configurations hold 2 by mistake; then it is the token with
            the highest id.
        projection_dim: size of the pooled output where it is projected, else None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CLIPTextConfig:
        """Read a parsed config.json.

        Args:
            raw: its fields. `architectures` says whether the pooled output is projected.

        Raises:
            UnsupportedConfigError: naming the field and its value.
        """
        f = Fields("text encoder", raw, defaults=_DEFAULTS, fixed=_FIXED, inert=_TRANSFORMERS.split())
        projected = "CLIPTextModelWithProjection" in (raw.get("architectures") or ())
        hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
        if hidden % heads:
            raise f.unsupported("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
        return cls(
            vocab_size=f.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size"),
            num_hidden_layers=f.integer("num_hidden_layers", DEEPEST),
            num_attention_heads=heads,
            max_position_embeddings=f.integer("max_position_embeddings"),
            hidden_act=f.string("hidden_act", ("quick_gelu", "gelu")),
            layer_norm_eps=f.number("layer_norm_eps"),
            eos_token_id=f.integer("eos_token_id"),
            projection_dim=f.integer("projection_dim") if projected else None,
        )


class CLIPTextEncoder(nn.Module):
    """Token ids to text embeddings.

    Args:
        config: its sizes.
        normalize_sequence: apply the final norm to the sequence, as Stable Diffusion 1.x and 2.x do; SDXL
            takes the layer's output as it is.
    """

    def __init__(self, config: CLIPTextConfig, *, normalize_sequence: bool) -> None:
        super().__init__()
        self.config = config
        self.normalize_sequence = normalize_sequence
        self.text_model = _TextModel(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            if config.projection_dim is not None
            else None
        )

    def forward(self, input_ids: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids: [B, S] int64, S at most max_position_embeddings; each row holds an end token.
            layer: int64 without dimensions: which states become the sequence. 0 is the embeddings, n the
                output of the n-th layer.

        Returns:
            sequence: [B, S, D].
            pooled: [B, P], the last layer's normed state at the first end token; projected where the encoder
                has a projection, else P = D.
        """
        states = self.text_model(input_ids)
        norm = self.text_model.final_layer_norm
        sequence = torch.stack(states).index_select(0, layer.reshape(1)).squeeze(0)
        if self.normalize_sequence:
            sequence = norm(sequence)

        end = input_ids if self.config.eos_token_id == 2 else input_ids == self.config.eos_token_id
        position = end.to(torch.int32).argmax(dim=-1)  # [B]
        pooled = norm(states[-1][torch.arange(position.shape[0], device=position.device), position])
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return sequence, pooled


class _TextModel(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> list[Tensor]:
        """The embeddings and every layer's output, each [B, S, D] and before the final norm."""
        states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


def _embedding(count: int, width: int) -> nn.Embedding:
    """nn.Embedding with its own initialisation spelt out: on the meta device `init.normal_` imports torch._dynamo,
    which takes half a second and leaves a cycle of frames that holds the pipeline."""
    return nn.Embedding(count, width, _weight=torch.randn(count, width))


class _Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        return out


class _Layers(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    """Causal self-attention and feed-forward, each on the norm of the residual stream."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = _CausalAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _FeedForward(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.layer_norm2.add(self.self_attn(self.layer_norm1(x)), x)
        out: Tensor = x + self.mlp(h)
        return out


class _CausalAttention(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]; position i sees positions up to i."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, D / H]
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # `kernels.attention` has no mask, and 77 tokens are too few to want a kernel of their own.
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(h.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        # Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2: exact, or by a sigmoid.
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h)
        out: Tensor = self.fc2(h)
        return out


_PREFIX = "text_model."


def rename_clip_keys(key: str) -> str:
    """The name a weight has here, from the name it has in a file.

    transformers 5 saves a text encoder without the `text_model.` that published checkpoints have.
    """
    if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return _PREFIX + key
    return key
