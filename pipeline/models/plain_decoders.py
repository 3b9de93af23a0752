"""Plain decoders: models of which config.json alone says every module, name and shape.

To learn these from transformers takes the import of torch and transformers, ten seconds on a slow machine. What is not plain to
see here, a value of another kind as well as another architecture, is left to transformers, and so is every word about what is
wrong. A test holds each family against transformers' own model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kasa.checkpoint import stored_shapes
from kasa.targets import Target
from pipeline.models.shapes import known_values

_Dtype = Literal["float32", "bfloat16", "float16"] | None
_Count = Field(ge=1)
_TOKEN: Any = Field(None, ge=0)

# What each way to turn positions needs. The others change how far a model reaches.
_ROPE_NEEDS: dict[Any, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class _Config(BaseModel):
    """The values of a config.json, with the types that transformers asks for; a size that is left out is not guessed."""

    model_config = ConfigDict(strict=True)

    vocab_size: int = _Count
    hidden_size: int = _Count
    intermediate_size: int = _Count
    num_hidden_layers: int = _Count
    num_attention_heads: int = _Count
    num_key_value_heads: int = _Count
    max_position_embeddings: int = _Count
    head_dim: int | None = Field(None, ge=1)
    hidden_act: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = _TOKEN
    bos_token_id: int | None = _TOKEN
    eos_token_id: int | list[int] | None = None
    attention_dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = Field(0.02, ge=0, le=1)
    use_cache: bool = True
    pretraining_tp: int | None = 1
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    dtype: _Dtype = None
    torch_dtype: _Dtype = None
    rope_theta: float = 1e4
    rope_parameters: dict[str, float | str] | None = None
    rope_scaling: dict[str, float | str] | None = None
    use_bidirectional_attention: None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None
    # Packed weights have other names and shapes, and what follows from foreign code is not known.
    quantization_config: None = None
    auto_map: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> _Config:
        whole = self.hidden_size % self.num_attention_heads == 0
        grouped = self.num_attention_heads % self.num_key_value_heads == 0
        inside = self.pad_token_id is None or self.pad_token_id < self.vocab_size
        layered = self.layer_types is None or len(self.layer_types) == self.num_hidden_layers
        if not (
            whole and grouped and inside and layered and all(map(_turns, (self.rope_parameters, self.rope_scaling)))
        ):
            raise ValueError("left to transformers")
        return self


@dataclass(frozen=True)
class _Family:
    """How the models of one type differ from LLaMA's.

    Attributes:
        prefix: what the names of its classes begin with.
        attention_bias: which projections of the attention have a bias: those to q, k and v, all if the configuration asks for
            it, or none.
        mlp_bias: whether the configuration may ask for biases in the MLP.
        head_norms: whether q and k are normalised head by head.
        head_dim: whether it must be written out, for it has a default of its own.
        activations: what the configuration calls the activation function, by default the first.
        activation: the class of that function.
        embedding: the class of the embedding.
        tied: whether the output head is the embedding, where the configuration does not say.
    """

    prefix: str
    attention_bias: Literal["none", "qkv", "asked"] = "asked"
    mlp_bias: bool = False
    head_norms: bool = False
    head_dim: bool = False
    activations: tuple[str | None, ...] = ("silu", None)
    activation: str = "SiLUActivation"
    embedding: str = "Embedding"
    tied: bool = False


FAMILIES = {
    "llama": _Family("Llama", mlp_bias=True),
    "mistral": _Family("Mistral", "none"),
    "qwen2": _Family("Qwen2", "qkv"),
    "qwen3": _Family("Qwen3", head_norms=True, head_dim=True),
    "gemma": _Family(
        "Gemma",
        head_dim=True,
        activations=("gelu_pytorch_tanh", "gelu", None),
        activation="GELUTanh",
        embedding="GemmaTextScaledWordEmbedding",
        tied=True,
    ),
}


class _Part(NamedTuple):
    """A module: its full name, its class, the shapes of its own parameters, and out and in features if it is linear."""

    name: str
    kind: str
    shapes: Mapping[str, tuple[int, ...]] = {}
    features: tuple[int, int] | None = None


@dataclass(frozen=True)
class PlainDecoder:
    """A plain decoder with its language model head.

    Attributes:
        config: the configuration's values.
        family: its family.
        parts: its modules, in the model's own order.
    """

    config: _Config
    family: _Family
    parts: tuple[_Part, ...] = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that a checkpoint of it holds."""
        return {f"{part.name}.{own}": shape for part in self.parts for own, shape in part.shapes.items()}

    @property
    def drops(self) -> bool:
        """Whether it drops activations at random in training."""
        return self.config.attention_dropout > 0

    @property
    def positions(self) -> int:
        """The length of the longest sequence that it was made for."""
        return self.config.max_position_embeddings

    def drawing(self, wanted: tuple[str, ...]) -> dict[str, Any]:
        """What `pipeline.models.paper.draw` makes of it, with the values of the configuration that are wanted."""
        config = self.config.model_dump()
        return {
            "parts": {part.name: _drawn(part) for part in self.parts},
            "output": "lm_head",
            "prefix": "model",
            "config": {name: config[name] for name in wanted if name in config},
            "positions": self.positions,
        }


def plain_decoder(values: Mapping[str, Any]) -> PlainDecoder | None:
    """The model of a configuration's values; None where it is no plain decoder."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        return None
    try:
        config = _Config.model_validate(values)
    except ValidationError:
        return None
    if config.hidden_act not in family.activations or (family.head_dim and config.head_dim is None):
        return None
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    tied = family.tied if config.tie_word_embeddings is None else config.tie_word_embeddings
    config = config.model_copy(update={"head_dim": size, "tie_word_embeddings": tied})
    return PlainDecoder(config, family, tuple(_model(config, family)))


def fitting_decoder(folder: Path) -> PlainDecoder | None:
    """The model in a folder, if it is a plain decoder and the tensors stored there are just its own.

    Raises:
        SpectrumError: a file of the checkpoint is missing or damaged.
    """
    decoder = plain_decoder(known_values(str(folder), folder) or {})
    return decoder if decoder is not None and stored_shapes(folder) == decoder.shapes else None


def _turns(rope: Mapping[str, Any] | None) -> bool:
    """Whether a setting of rotary positions is one of those that need no transformers to understand."""
    if rope is None:
        return True
    needs = _ROPE_NEEDS.get(rope.get("rope_type", rope.get("type", "default")))
    numbers = {name for name, value in rope.items() if not isinstance(value, str)}
    return needs is not None and numbers.issuperset(needs)


def _model(config: _Config, family: _Family) -> Iterator[_Part]:
    width, words = config.hidden_size, config.vocab_size
    yield _Part("", f"{family.prefix}ForCausalLM")
    yield _Part("model", f"{family.prefix}Model")
    yield _Part("model.embed_tokens", family.embedding, {"weight": (words, width)})
    yield _Part("model.layers", "ModuleList")
    for layer in range(config.num_hidden_layers):
        yield from _layer(f"model.layers.{layer}", config, family)
    yield _Part("model.norm", f"{family.prefix}RMSNorm", {"weight": (width,)})
    yield _Part("model.rotary_emb", f"{family.prefix}RotaryEmbedding")
    head = _linear("lm_head", words, width)
    yield head._replace(shapes={}) if config.tie_word_embeddings else head


def _layer(name: str, config: _Config, family: _Family) -> Iterator[_Part]:
    width, norm = config.hidden_size, f"{family.prefix}RMSNorm"
    yield _Part(name, f"{family.prefix}DecoderLayer")
    yield from _attention(f"{name}.self_attn", config, family)
    yield _Part(f"{name}.mlp", f"{family.prefix}MLP")
    bias = family.mlp_bias and config.mlp_bias
    for side in ("gate", "up"):
        yield _linear(f"{name}.mlp.{side}_proj", config.intermediate_size, width, bias)
    yield _linear(f"{name}.mlp.down_proj", width, config.intermediate_size, bias)
    yield _Part(f"{name}.mlp.act_fn", family.activation)
    for place in ("input", "post_attention"):
        yield _Part(f"{name}.{place}_layernorm", norm, {"weight": (width,)})


def _attention(name: str, config: _Config, family: _Family) -> Iterator[_Part]:
    width, size = config.hidden_size, config.head_dim or 0
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    asked = family.attention_bias == "asked" and config.attention_bias
    yield _Part(name, f"{family.prefix}Attention")
    for letter, features in (("q", queries), ("k", keys), ("v", keys)):
        yield _linear(f"{name}.{letter}_proj", features, width, asked or family.attention_bias == "qkv")
    yield _linear(f"{name}.o_proj", width, queries, asked)
    for letter in "qk" if family.head_norms else "":
        yield _Part(f"{name}.{letter}_norm", f"{family.prefix}RMSNorm", {"weight": (size,)})


def _linear(name: str, outputs: int, inputs: int, bias: bool = False) -> _Part:
    shapes: dict[str, tuple[int, ...]] = {"weight": (outputs, inputs)}
    return _Part(name, "Linear", shapes | ({"bias": (outputs,)} if bias else {}), (outputs, inputs))


def _drawn(part: _Part) -> dict[str, Any]:
    return {
        "kind": part.kind,
        "sizes": [math.prod(shape) for shape in part.shapes.values()],
        "target": asdict(Target(part.name, *part.features)) if part.features else None,
    }
