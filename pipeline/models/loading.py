"""The one door through which every stage loads a base, and the checks at it.

A base is loaded with its weights (`load_base`), or empty on torch's meta device (`empty_base`), which reads the names and
shapes of the stored tensors and none of their bytes. Both refuse a checkpoint that does not fit its configuration, by what
transformers says of the loading, and neither runs code that came with the checkpoint. Attention is what the model's own flags
allow: scaled dot product attention, or plain PyTorch ("eager") for a model that does more, such as capping its scores.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from kasa.checkpoint import stored_tensors
from kasa.targets import Outline, remarks_on
from pipeline.config.settings import HeadKind
from pipeline.core.errors import BaseModelError, one_line
from pipeline.models.prompting import LANGUAGE_MODEL, Head, head_modules, load_tokenizer
from pipeline.models.shapes import base_outline, meta_model, position_count, read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_OPTIONAL = "pooler"
_NAMED = 4
_EAGER = (
    "attention of this base runs in plain PyTorch (eager): it does more than the fused kernels can, and takes more time and "
    "memory"
)


def load_base(folder: Path, precision: str, head: Head = LANGUAGE_MODEL, seed: int = 0) -> nn.Module:
    """Load the model in evaluation mode, on the CPU, or partitioned if an `HfDeepSpeedConfig` for ZeRO-3 is alive.

    A new head is initialised from the seed, whatever the checkpoint holds. It stays in fp32, because a value or a ranking of
    logits needs more than the eight bits of a bf16 mantissa, and takes inputs of any floating type. A pooler that the
    checkpoint lacks, as a masked language model's does, is part of it.

    Args:
        precision: `fp32` or `bf16`.
        seed: Seeds the initial weights of a new head.

    Raises:
        BaseModelError: The checkpoint does not fit its configuration or cannot be read, or transformers has no such head
            for the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    # Read first for their plainer errors.
    read_config(folder)
    stored = stored_tensors(folder)
    models: Any = AutoModelForSequenceClassification if head.is_new else AutoModelForCausalLM
    with _strict(folder):
        model, loading = models.from_pretrained(
            folder, dtype=DTYPES[precision], local_files_only=True, **_labels(head), **_STRICTLY
        )
    _refuse_misfit(folder, model, loading, head.kind, stored)
    if head.is_new:
        _begin_head(model, folder, seed)
    return model


def empty_base(folder: Path, head: HeadKind) -> nn.Module:
    """The model of a folder on the meta device, after the checks of `load_base`. Arguments and errors are those of there."""
    config = read_config(folder)
    model = meta_model(config, head)
    if getattr(config, "quantization_config", None) is not None:
        return model  # packed weights have other names and shapes
    stored = stored_tensors(folder)
    with _strict(folder):
        model, loading = type(model).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=dict(stored), device_map="meta", **_STRICTLY
        )
    _refuse_misfit(folder, model, loading, head, stored)
    return model


def draw_outline(folder: Path, head: HeadKind) -> Outline:
    """The outline of a base, with what people should know of how it is loaded. Errors are those of `empty_base`."""
    model: Any = empty_base(folder, head)
    outline = base_outline(model, head)
    eager = [_EAGER] if model.config._attn_implementation == "eager" else []
    remarks = (*remarks_on(model, outline.linear), *eager)
    return replace(outline, remarks=remarks, drops=_drops(model.config), positions=position_count(model))


def _drops(config: Any) -> bool:
    """Whether any probability of dropout in a configuration, whatever its name, is above 0."""
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in values.items())


# What does not fit is refused here, by name, rather than by transformers in some cases and not in others.
_STRICTLY: dict[str, Any] = {
    "trust_remote_code": False,
    "ignore_mismatched_sizes": True,
    "output_loading_info": True,
}


@contextmanager
def _strict(folder: Path) -> Iterator[None]:
    """Silence what transformers explains at length, and name the base in its errors."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise BaseModelError(f"the base in {folder} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _labels(head: Head) -> dict[str, Any]:
    if not head.is_new:
        return {}
    classes = head.classes or ("value",)
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def _refuse_misfit(
    folder: Path, model: Any, loading: Mapping[str, Any], head: HeadKind, stored: Mapping[str, torch.Tensor]
) -> None:
    """Mark the parts of the body that begin with a new head, and refuse weights that are missing, unknown or misshapen."""
    beside: Sequence[str] = ()
    if head != "language-model":
        model.new_parts = _absent_pooler(model, loading["missing_keys"])
        beside = head_modules(model)
    missing = [name for name in loading["missing_keys"] if not _lies_in(name, beside)]
    misshapen = [
        f"{name} ({_shape(found)}, not {_shape(own)})"
        for name, found, own in loading["mismatched_keys"]
        if not _lies_in(name, beside)
    ]
    unknown = [name for name in loading["unexpected_keys"] if not _is_needless(name, model, head, stored)]
    wrong = [
        f"{what} {_some(names)}"
        for what, names in (
            ("lacks", missing),
            ("holds what the model has no place for:", unknown),
            ("holds in another shape", misshapen),
            ("cannot be read:", list(loading["error_msgs"])),
        )
        if names
    ]
    if wrong:
        raise BaseModelError(
            f"the checkpoint in {folder} does not fit its config.json: it {'; it '.join(wrong)}; use a complete checkpoint "
            "with its own config.json"
        )


def _absent_pooler(model: Any, missing: Sequence[str]) -> list[str]:
    """The body's pooler, where the body can be without one, and the checkpoint has nothing of it."""
    body = model.base_model
    if "add_pooling_layer" not in inspect.signature(type(body).__init__).parameters:
        return []
    pooler = getattr(body, _OPTIONAL, None)
    name = f"{model.base_model_prefix}.{_OPTIONAL}"
    if pooler is None or not all(f"{name}.{own}" in missing for own, _ in pooler.named_parameters()):
        return []
    return [name]


def _is_needless(name: str, model: Any, head: HeadKind, stored: Mapping[str, torch.Tensor]) -> bool:
    """Whether a stored tensor is rightly passed over: an old buffer, or, beside a new head, another head or pooler."""
    tensor = next((one for key, one in stored.items() if key.endswith(name) or name.endswith(f".{key}")), None)
    # Causal masks and the value of masked scores, which old checkpoints have among their weights.
    if tensor is not None and (tensor.numel() == 1 or (tensor.dim() == 4 and tensor.shape[:2] == (1, 1))):
        return True
    if head == "language-model":
        return False
    prefix = f"{model.base_model_prefix}."
    has_head = any(key.startswith(prefix) for key in stored)
    return (has_head and not name.startswith(prefix)) or name.removeprefix(prefix).startswith(f"{_OPTIONAL}.")


def _lies_in(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(sorted(names)[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _begin_head(model: Any, folder: Path, seed: int) -> None:
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = _padding(config, folder)
    model.config.pad_token_id = config.pad_token_id
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for name in head_modules(model):
        _initialise(model.get_submodule(name), name, seed, spread)


def _padding(config: Any, folder: Path) -> int:
    """A token for padding where the base names none: one that ends texts, by its configuration or its tokenizer."""
    ends = end_tokens(config)
    if ends:
        return ends[0]
    tokenizer = load_tokenizer(folder)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BaseModelError(
        f"the base in {folder} names no padding token and no end of text; set pad_token_id in its config.json"
    )


def end_tokens(config: Any) -> list[int]:
    """The ids at which a configuration (the model's or that of its generation) says that a text ends."""
    declared = getattr(config, "eos_token_id", None)
    if declared is None:
        return []
    return [int(token) for token in (declared if isinstance(declared, (list, tuple)) else [declared])]


def greedy_settings(declared: Any, config: Any, tokenizer: Any, count: int) -> Any:
    """The settings of every generation: the likeliest token each time, up to any that base or tokenizer declare to be an end.

    Whatever else the base's `generation_config.json` asks for (penalties, suppressed or forced tokens, sampling) is left out,
    since the answers would be the likeliest no more.

    Args:
        declared: the base's generation settings.
        config: the configuration of its text model.
        count: how many tokens it has an embedding for.
    """
    from transformers import GenerationConfig

    known = range(count)
    every = [*end_tokens(declared), *end_tokens(config), *end_tokens(tokenizer)]
    ends = [token for token in dict.fromkeys(every) if token in known]
    # It is masked; but the model must have an embedding for it.
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token in known), 0)
    return GenerationConfig(do_sample=False, eos_token_id=ends or None, pad_token_id=pad)


def _initialise(module: nn.Module, name: str, seed: int, spread: float) -> None:
    """Give a module fp32 parameters as transformers initialises them: weights normal, biases 0, scales of norms 1.

    Each parameter is drawn from a generator of its own, so its values do not depend on what else the head has.
    """
    for path, parameter in list(module.named_parameters()):
        # Under ZeRO-3 the parameter is empty. Its replacement has its full shape until the engine partitions it.
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
