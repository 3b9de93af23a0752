"""How much memory one training worker needs, from shapes alone.

An estimate of what the method itself allocates. Not in it: the framework (CUDA context, Python, about 1 GiB), the
communication buckets of DeepSpeed, allocator fragmentation, and other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

GIB = 2**30

# An adapted module: name, out features, in features.
AdaptedModule = tuple[str, int, int]


@dataclass(frozen=True)
class MemoryItem:
    """One use of memory on every worker.

    `on_host` is true for what DeepSpeed keeps in host memory although the worker has a GPU.
    """

    kind: str
    gib: float
    on_host: bool = False


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one decoder block that decide its activation memory, in elements per token."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    vocabulary: int


def block_shape(config: Any) -> BlockShape | None:
    """The block sizes in a transformers configuration; None where it does not name them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    heads, vocabulary = getattr(text, "num_attention_heads", None), getattr(text, "vocab_size", None)
    if not (hidden and layers and heads and vocabulary):
        return None
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    return BlockShape(layers, hidden, intermediate, heads * head_dim, vocabulary)


def activation_bytes(
    shape: BlockShape,
    adapted: Sequence[AdaptedModule],
    tokens: int,
    *,
    element_bytes: int,
    rank: int,
    mask_bytes: int,
    checkpointing: bool,
    zero_stage: int,
) -> int:
    """What the backward pass keeps of one micro-batch of `tokens` tokens, in bytes, without the logits.

    Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1) count s b h (34 + 5 a s / h) bytes per layer for a GPT in 16 bit.
    Counted anew here for a LLaMA block with a frozen base, e bytes per element, h hidden, f intermediate, q = heads x
    head size, per token:

        two RMS norms         8 h    (their input in fp32)
        attention             4 q e  (q, k, v, output; k and v repeated to all heads). The scores, 5 a s / h there, are
                                     recomputed by fused attention (SDPA).
        gated MLP             3 f e  (gate, its activation, up)
        inputs of adapters    e per feature, once for modules that share them (q, k, v; gate, up). Frozen weights need
                                     no input for their own gradient. With dropout each adapter keeps its own dropped
                                     input and the mask instead: e + mask_bytes per feature.
        inside an adapter     2 r e  (A x and d * A x)
        ZeRO stage 3          (2 h + f) e for the shared inputs in any case: DeepSpeed's own linear function keeps the
                                     input of every linear module, frozen or not.

    `mask_bytes` is 0 without dropout, 1 on a GPU and e on a CPU, whose masks have the type of the data.
    With checkpointing each block keeps its input, h e, and one block at a time is recomputed (their section 5).
    """
    shared = 0 if mask_bytes else _shared_inputs(adapted)
    if zero_stage == 3:
        shared = max(shared, shape.layers * (2 * shape.hidden + shape.intermediate))
    everything: float = shape.layers * _block(shape, element_bytes) + shared * element_bytes
    everything += 2 * rank * element_bytes * len(adapted)
    if mask_bytes:
        everything += sum(in_features for _, _, in_features in adapted) * (element_bytes + mask_bytes)
    if checkpointing:
        everything = shape.layers * shape.hidden * element_bytes + everything / shape.layers
    return int(everything * tokens)


def logits_bytes(vocabulary: int, tokens: int, element_bytes: int) -> int:
    """Logits of one micro-batch with their loss, in bytes: V (e + 4 + 4 + 4) per token.

    The logits, their fp32 copy (none where they already are fp32), the log-probabilities, and their gradient.
    """
    upcast = 4 if element_bytes < 4 else 0
    return vocabulary * tokens * (element_bytes + upcast + 8)


def optimizer_bytes(trainable: int, zero_stage: int, element_bytes: int, workers: int) -> float:
    """fp32 master weights and Adam's two moments on one worker: 12 bytes per trainable parameter.

    Divided by the workers from ZeRO stage 1 on. Stage 0 in fp32 needs no separate master copy: 8 bytes.
    """
    if zero_stage == 0:
        return trainable * (8 if element_bytes == 4 else 12)
    return trainable * 12 / workers


def gathered_bytes(model: nn.Module, element_bytes: int) -> int:
    """Weights that ZeRO stage 3 holds whole at a time, in bytes: the largest block, twice (used, prefetched)."""
    blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    inside = {id(p) for block in blocks for p in block.parameters()}
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    sizes += [p.numel() for p in model.parameters() if id(p) not in inside]
    return 2 * max(sizes, default=0) * element_bytes


def _block(shape: BlockShape, element_bytes: int) -> int:
    return 8 * shape.hidden + (4 * shape.query + 3 * shape.intermediate) * element_bytes


def _shared_inputs(adapted: Sequence[AdaptedModule]) -> int:
    return sum(width for _, width in {(name.rpartition(".")[0], in_features) for name, _, in_features in adapted})
