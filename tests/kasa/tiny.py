"""Tiny language models in Hugging Face folders, and adapters with random values for them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kasa import CheckpointWeights, KasaConfig, attach_saved, find_targets
from kasa.adapter_file import SavedAdapter
from kasa.checkpoint import weight_digest
from kasa.spectra import bottom_triplets
from kasa.truncation import dropped_rank

VOCABULARY = 64
TOKENS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
    """Square, tall and wide weights: q is 32 x 32, k 16 x 32, gate 48 x 32, down 32 x 48."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_gpt2(folder: Path) -> Path:
    """Conv1D layers, which store W^T."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    )
    config.initializer_range = 0.2
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """The model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(folder: Path, config: KasaConfig, targets: str | list[str] = "all-linear") -> SavedAdapter:
    """An adapter with random A, d and B, and the dropped factors its configuration asks for."""
    generator = torch.Generator().manual_seed(3)
    weights = CheckpointWeights(folder)
    found = find_targets(load(folder), targets)
    tensors, dropped, digests = {}, {}, {}
    for target in found:
        weight = weights.weight(target)
        digests[target.name] = weight_digest(weight)
        shapes = {"a": (config.rank, target.in_features), "d": (config.rank,), "b": (target.out_features, config.rank)}
        tensors |= {f"{target.name}.{name}": torch.randn(s, generator=generator) / 4 for name, s in shapes.items()}
        if rank := dropped_rank(target, config.truncation, config.dropped_rank):
            left, right = bottom_triplets(weight, rank).dropped_factors(rank)
            dropped |= {f"{target.name}.dropped_left": left, f"{target.name}.dropped_right": right}
    return SavedAdapter(config, tuple(found), str(folder), digests, tensors, dropped)


def adapted_logits(folder: Path, adapter: SavedAdapter) -> torch.Tensor:
    """What base and adapter say."""
    model = load(folder)
    attach_saved(model, adapter)
    return logits(model.eval())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the fixed tokens."""
    return model(input_ids=TOKENS).logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
