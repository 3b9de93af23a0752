"""The memory that one training worker needs, computed from shapes alone.

The peak of a step is when the backward pass of a micro-batch begins: weights and states, activations, and logits are in use.
Gaps in an allocator's free lists and other processes are not counted. `make bench ONLY=plan` compares the sum with real
training (docs/decisions.md, section Plan).

Legend: e = bytes per element, h = hidden size, f = intermediate size, q = heads x head size, k = key-value heads x head
size, V = vocabulary, r = adapter rank, D = dropped rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kasa.targets import Target
from pipeline.config.deepspeed import (
    offloads_optimizer,
    offloads_parameters,
    quantises_frozen,
    workers_of_a_copy,
    zero_stage,
)

if TYPE_CHECKING:
    from torch import nn

GIB = 2**30

# A worker without a model. On a CPU: Python with torch, transformers, datasets and DeepSpeed, measured by the check `plan`.
# On a GPU: the CUDA context with the workspaces of cuBLAS and NCCL; assumed, not measured.
PROCESS_GIB = {"cpu": 0.58, "gpu": 1.0}

# DeepSpeed 0.19.8's defaults, in elements.
_REDUCE_BUCKET = 500_000_000
_MAX_LIVE = 1_000_000_000
_PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True)
class MemoryItem:
    """One use of memory on every worker.

    Attributes:
        kind: what the memory is for.
        gib: its size in GiB.
        on_host: whether it is host memory although the worker has a GPU.
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
    key_value: int
    vocabulary: int


@dataclass(frozen=True)
class AdaptedModule:
    """An adapted module: its shape, the adapter's rank, and the rank that is dropped from it."""

    target: Target
    rank: int
    dropped: int

    @property
    def features(self) -> int:
        """in + out features."""
        return self.target.in_features + self.target.out_features

    @property
    def trainable(self) -> tuple[int, int, int]:
        """Elements of A (r x in), d (r) and B (out x r)."""
        return self.rank * self.target.in_features, self.rank, self.rank * self.target.out_features

    @property
    def factors(self) -> tuple[int, int]:
        """Elements of the frozen U_d S_d (out x D) and V_d^T (D x in)."""
        return self.dropped * self.target.out_features, self.dropped * self.target.in_features


@dataclass(frozen=True)
class ForwardPass:
    """One micro-batch on one worker.

    Attributes:
        rows: number of rows.
        row_tokens: tokens of the longest row, to which the others are padded.
        element_bytes: bytes per element of weights and activations (e).
        masked: whether attention needs a mask: rows are padded, or hold several samples that must not see each other.
        dropout_mask_bytes: bytes per element of a dropout mask; 0 without dropout.
        checkpointing: whether blocks are recomputed in the backward pass.
    """

    rows: int
    row_tokens: int
    element_bytes: int
    masked: bool = True
    dropout_mask_bytes: int = 0
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class Partitioning:
    """How a DeepSpeed configuration distributes memory.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        workers: number of workers that it partitions over.
        offload_optimizer: whether optimizer states and gradients are kept in host memory.
        offload_weights: whether frozen weights are kept in host memory.
        bucket: elements of the buffers in which gradients are reduced (two where communication overlaps).
        max_live: elements of other workers' weights that stage 3 gathers ahead.
        persistence: number of elements below which a tensor stays whole on every worker at stage 3.
        copy_workers: workers that hold one secondary copy of the weights between them (ZeRO++); 1 without one.
        quantised: whether frozen weights are kept in 8 bits.
    """

    stage: int
    workers: int
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 0
    max_live: int = _MAX_LIVE
    persistence: int = _PERSISTENCE_THRESHOLD
    copy_workers: int = 1
    quantised: bool = False

    def frozen_bytes(self, elements: int, element_bytes: int) -> float:
        """Bytes of frozen weights on one worker, which stage 3 partitions."""
        if self.stage < 3:
            return elements * element_bytes
        shares = 1 / self.workers + (1 / self.copy_workers if self.copy_workers > 1 else 0)
        return elements * shares * (1 if self.quantised else element_bytes)

    @classmethod
    def from_config(cls, config: dict[str, Any], workers: int) -> Partitioning:
        """Read a DeepSpeed configuration."""
        zero, stage = config.get("zero_optimization", {}), zero_stage(config)
        bucket = int(zero.get("reduce_bucket_size", _REDUCE_BUCKET))
        # DeepSpeed overlaps at stage 3 unless told otherwise; there one buffer serves both.
        doubled = stage in (1, 2) and zero.get("overlap_comm", False)
        return cls(
            stage=stage,
            workers=workers,
            offload_optimizer=offloads_optimizer(config),
            offload_weights=offloads_parameters(config),
            bucket=0 if stage == 0 else bucket * (2 if doubled else 1),
            max_live=int(zero.get("stage3_max_live_parameters", _MAX_LIVE)),
            persistence=int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)),
            copy_workers=workers_of_a_copy(config),
            quantised=quantises_frozen(config),
        )


def worker_memory(
    model: nn.Module,
    shape: BlockShape | None,
    adapted: Sequence[AdaptedModule],
    forward: ForwardPass,
    parts: Partitioning,
    *,
    gpu: bool,
    spectra_rank: int,
) -> tuple[MemoryItem, ...]:
    """All uses of memory on one worker, without activations and logits where the block's `shape` is unknown."""
    e = forward.element_bytes
    items = [
        MemoryItem("process", PROCESS_GIB["gpu" if gpu else "cpu"]),
        MemoryItem("base weights", parts.frozen_bytes(base_parameters(model), e) / GIB, parts.offload_weights),
        MemoryItem("gathered weights", gathered_bytes(model, e, parts) / GIB),
        *_adapter_items(adapted, e, parts, spectra_rank, gpu),
        *_training_items(adapted, e, parts, gpu),
    ]
    if shape is not None:
        logits = logits_bytes(shape.vocabulary, forward.tokens)
        kept = activation_bytes(shape, adapted, forward, parts.stage)
        items += [MemoryItem("activations", kept / GIB), MemoryItem("logits", logits / GIB)]
    return tuple(item for item in items if item.gib)


def block_shape(config: Any) -> BlockShape | None:
    """The block sizes of a transformers configuration; None where it does not name them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    heads, vocabulary = getattr(text, "num_attention_heads", None), getattr(text, "vocab_size", None)
    if not (hidden and layers and heads and vocabulary):
        return None
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    return BlockShape(layers, hidden, intermediate, heads * head_dim, key_value_heads * head_dim, vocabulary)


def base_parameters(model: nn.Module) -> int:
    """Parameters of the base; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trainable_parameters(adapted: Sequence[AdaptedModule]) -> int:
    """Parameters of A, d and B over all modules: sum of r (in + out) + r."""
    return sum(sum(module.trainable) for module in adapted)


def frozen_factor_parameters(adapted: Sequence[AdaptedModule]) -> int:
    """Elements of the frozen factors over all modules: sum of D (in + out)."""
    return sum(sum(module.factors) for module in adapted)


def activation_bytes(
    shape: BlockShape, adapted: Sequence[AdaptedModule], forward: ForwardPass, zero_stage: int
) -> float:
    """Bytes that the backward pass keeps of one micro-batch, without the logits.

    Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1) count s b h (34 + 5 a s / h) bytes per layer for a GPT in 16 bit.
    This is the count for a LLaMA block with a frozen base, per layer and token:

        two RMS norms         8 h    (their input in fp32)
        attention             2 q e  (q, output), and k and v: 2 q e where there is a mask, for then they are repeated to
                                     all heads, else 2 k e. The scores, 5 a s / h there, are recomputed by fused attention.
        mask                  e per token of the longest row: each layer keeps its own mask in the type of the data
        gated MLP             3 f e  (gate, its activation, up)
        inputs of adapters    e per feature, once for modules that share them (q, k, v; gate, up); the attention's output
                                     is kept already. With dropout each adapter keeps its own dropped input and the mask.
        inside an adapter     (r + D) e, and with a dropped part its two stacked factors, (r + D)(in + out) e once
        ZeRO stage 3          (2 h + f) e for the shared inputs in any case: DeepSpeed's own linear function keeps the
                                     input of every linear module, frozen or not.

    With checkpointing each block keeps its input, h e, and one block at a time is recomputed, by when the logits are gone:
    only what that block takes beyond the logits' place is added.
    """
    e, tokens = forward.element_bytes, forward.tokens
    per_token = shape.layers * _block_bytes(shape, forward) + sum((m.rank + m.dropped) * e for m in adapted)
    shared = 0 if forward.dropout_mask_bytes else _shared_inputs(adapted)
    if forward.dropout_mask_bytes:
        per_token += sum(m.target.in_features for m in adapted) * (e + forward.dropout_mask_bytes)
    if zero_stage == 3:
        shared = max(shared, shape.layers * (2 * shape.hidden + shape.intermediate))
    everything: float = (per_token + shared * e) * tokens + sum(_stacked_elements(m, forward) for m in adapted) * e
    if not forward.checkpointing:
        return everything
    recomputed = everything / shape.layers
    return shape.layers * shape.hidden * e * tokens + max(0, recomputed - logits_bytes(shape.vocabulary, tokens))


def logits_bytes(vocabulary: int, tokens: int) -> int:
    """Logits of one micro-batch with their loss, in bytes, at most: 12 V per token, every token labelled.

    Log-probabilities, the gradient of the loss in them and that in the logits, all fp32.
    """
    return 12 * vocabulary * tokens


def gathered_bytes(model: nn.Module, element_bytes: int, parts: Partitioning) -> int:
    """Bytes of other workers' weights that stage 3 holds gathered at a time.

    DeepSpeed gathers ahead at each module, faster than modules use weights up, until `stage3_max_live_parameters`
    elements are whole; the weight that is needed next comes on top. A single worker's weights are whole already.
    """
    if parts.stage < 3 or (parts.workers == 1 and not parts.offload_weights):
        return 0
    sizes = [parameter.numel() for parameter in model.parameters()]
    return min(sum(sizes), parts.max_live + max(sizes, default=0)) * element_bytes


def optimizer_bytes(trainable: int, parts: Partitioning) -> float:
    """Bytes of fp32 master weights and Adam's two moments on one worker: 12 per trainable parameter, divided by the workers.

    Stage 0, which trains in fp32 alone, needs no master copy and divides nothing: 8 bytes.
    """
    return trainable * 8 if parts.stage == 0 else trainable * 12 / parts.workers


def _adapter_items(
    adapted: Sequence[AdaptedModule], element_bytes: int, parts: Partitioning, spectra_rank: int, gpu: bool
) -> list[MemoryItem]:
    adapter, factors = trainable_parameters(adapted), frozen_factor_parameters(adapted)
    # The worker keeps the spectra, and an fp32 copy of the factors to save them with the adapter.
    kept = factors + sum(spectra_rank * (module.features + 1) for module in adapted)
    frozen = parts.frozen_bytes(factors, element_bytes)
    if parts.stage == 3:
        # The regulariser gathers the whole adapter until the backward pass has ended.
        adapter += adapter // parts.workers
        sizes = [size for module in adapted for size in module.factors]
        frozen += element_bytes * sum(size for size in sizes if size < parts.persistence)
    return [
        MemoryItem("adapter", element_bytes * adapter / GIB),
        MemoryItem("dropped factors", frozen / GIB, parts.offload_weights),
        MemoryItem("factors kept for saving", 4 * kept / GIB, gpu),
    ]


def _training_items(
    adapted: Sequence[AdaptedModule], element_bytes: int, parts: Partitioning, gpu: bool
) -> list[MemoryItem]:
    trainable = trainable_parameters(adapted)
    share = parts.workers if parts.stage >= 2 else 1
    # On a CPU memory counts once it is written to, and gradients never fill more than their own size.
    bucket = parts.bucket if gpu else min(parts.bucket, trainable)
    return [
        MemoryItem("gradients", element_bytes * trainable / share / GIB, parts.offload_optimizer),
        MemoryItem("optimizer states", optimizer_bytes(trainable, parts) / GIB, parts.offload_optimizer),
        MemoryItem("DeepSpeed buckets", element_bytes * bucket / GIB),
    ]


def _block_bytes(shape: BlockShape, forward: ForwardPass) -> int:
    attention = 2 * shape.query + 2 * (shape.query if forward.masked else shape.key_value)
    mask = forward.row_tokens if forward.masked else 0
    return 8 * shape.hidden + (attention + mask + 3 * shape.intermediate) * forward.element_bytes


def _shared_inputs(adapted: Sequence[AdaptedModule]) -> int:
    """Input features per token that adapters keep, without the attention's output, which is kept in any case."""
    inputs = {
        (module.target.name.rpartition(".")[0], module.target.in_features)
        for module in adapted
        if not module.target.name.endswith(".o_proj")
    }
    return sum(width for _, width in inputs)


def _stacked_elements(module: AdaptedModule, forward: ForwardPass) -> int:
    """Elements that an adapter stacks from its tensors in each forward pass and keeps for the backward pass."""
    target, width = module.target, module.rank + module.dropped
    if not module.dropped or forward.dropout_mask_bytes:
        return width * target.out_features
    return width * module.features
