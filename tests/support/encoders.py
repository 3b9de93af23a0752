"""Small random encoders with a tokenizer, for checks and tests of models with a new head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

Architecture = Literal["bert", "roberta", "deberta-v2", "llama"]
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'"


def write_encoder(folder: Path, architecture: Architecture, seed: int = 0) -> Path:
    """Write a base without a head, as encoders are published, of two layers of width 32, and a tokenizer of letters."""
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    _model(architecture, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _model(architecture: Architecture, vocabulary: int) -> Any:
    import transformers

    sizes: dict[str, Any] = _SIZES | {
        "vocab_size": vocabulary,
        "max_position_embeddings": 130,
        "initializer_range": 0.1,
    }
    if architecture == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes))
    if architecture == "roberta":
        config = transformers.RobertaConfig(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3)
        return transformers.RobertaModel(config, add_pooling_layer=False)
    if architecture == "deberta-v2":
        relative: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
        return transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, **relative, type_vocab_size=0))
    return transformers.LlamaModel(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    names: dict[str, Any] = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **names, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
