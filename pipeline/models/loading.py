"""The base model with its weights, and with the head it is given. The door to transformers' model classes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core.errors import BaseModelError
from pipeline.models.heads import LANGUAGE_MODEL, Head, head_modules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_base(folder: Path, precision: str, head: Head = LANGUAGE_MODEL, seed: int = 0) -> nn.Module:
    """The model with its weights on the CPU (or partitioned, where ZeRO-3 has been announced), in evaluation mode.

    A new head is drawn from the seed, whatever the checkpoint holds, and stays in fp32: a value or a ranking of logits needs
    more than the eight bits of bf16. It takes inputs of any floating type.

    Raises:
        BaseModelError: the model lacks weights of its body, or transformers has no such head for it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if head.is_new:
        return _with_new_head(folder, precision, head, seed)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True
    )


def _with_new_head(folder: Path, precision: str, head: Head, seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would say at length that the head is new
    classes = head.classes or ("value",)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            local_files_only=True,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: index for index, name in enumerate(classes)},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    names = head_modules(model)
    for key in sorted(loading["missing_keys"]):
        if key.partition(".")[0] not in names:
            raise BaseModelError(
                f"{folder} holds no weights for {key}, so part of the body would be random; use a complete checkpoint"
            )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = model.config.eos_token_id
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    for name in names:
        _start_anew(model.get_submodule(name), name, seed, float(getattr(model.config, "initializer_range", 0.02)))
    return model


def _start_anew(module: nn.Module, name: str, seed: int, spread: float) -> None:
    """Give a module fp32 parameters as transformers starts them: weights normal, biases 0, scales of norms 1."""
    for path, parameter in list(module.named_parameters()):
        # Under ZeRO-3 the parameter is empty, and what replaces it is whole until the engine starts.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        owner, attribute = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if attribute == "bias":
            fresh = torch.zeros(shape)
        elif len(shape) < 2:
            fresh = torch.ones(shape)
        else:
            fresh = torch.normal(0.0, spread, shape, generator=_generator(seed, f"{name}.{path}"))
        setattr(owner, attribute, nn.Parameter(fresh))
    module.register_forward_pre_hook(_in_its_own_type)


def _in_its_own_type(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
