"""DeepSpeed's JSON files: finding them, checking them, and adding what the recipe decides.

A file holds DeepSpeed's own decisions only (ZeRO stage, bucket sizes, overlap, offload, persistence). Settings that belong
to the recipe are refused. So are unknown top-level keys, because DeepSpeed itself would ignore them silently. DeepSpeed is
not imported here: a plan is computed on the driver, which may not have it.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

from kasa.errors import nearest
from pipeline.config.deepspeed_values import KNOWN_KEYS, check_values
from pipeline.config.settings import TrainSettings
from pipeline.core.errors import RecipeError, one_line
from pipeline.core.files import user_path

# Keys whose value the recipe decides, with the recipe's key.
RECIPE_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size / (train.workers x train.micro_batch_size)",
    "gradient_clipping": "train.gradient_clipping",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_share",
    "activation_checkpointing": "train.gradient_checkpointing",
}

# Keys that `complete_config` sets.
PIPELINE_KEYS = frozenset(
    {
        "managed_gradient_accumulation",
        "steps_per_print",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)

_NEVER = 10**9  # steps between DeepSpeed's own lines of progress


def config_names() -> list[str]:
    """The names of the shipped files in `deepspeed_configs/`, sorted, without their suffix."""
    found = files("deepspeed_configs").iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in found if entry.name.endswith(".json"))


def load_deepspeed_config(name_or_path: str) -> dict[str, Any]:
    """Read and check a DeepSpeed configuration.

    Args:
        name_or_path: A name in `deepspeed_configs/`, or the path of a JSON file.

    Raises:
        RecipeError: There is no such file, no JSON object, a key DeepSpeed does not know, a key that belongs to the recipe, a
            value that DeepSpeed cannot use, or a ZeRO section without a valid stage.
    """
    where, text = _read(name_or_path)
    try:
        config = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{where} must hold a JSON object, not {type(config).__name__}")
    _check_keys(config, where)
    _check_zero(config.get("zero_optimization"), where)
    check_values(config, where)
    return config


def complete_config(config: dict[str, Any], train: TrainSettings) -> dict[str, Any]:
    """A copy of a loaded configuration with the recipe's values added. `with_accumulation` adds the batch sizes.

    Raises:
        RecipeError: DeepSpeed cannot train with this combination of file and recipe.
    """
    if zero_stage(config) == 0 and train.precision == "bf16":
        # DeepSpeed 0.19.8 keeps a step counter of its own there, and parameters take another path (docs/decisions.md).
        raise RecipeError(
            f"train.deepspeed {train.deepspeed} is ZeRO stage 0, which DeepSpeed does not train rightly with "
            "train.precision bf16; use stage 1, such as cpu_zero1, or train.precision=fp32"
        )
    if train.workers % workers_of_a_copy(config):
        raise RecipeError(
            f"train.deepspeed {train.deepspeed} keeps a copy of the frozen weights on every "
            f"{workers_of_a_copy(config)} workers (zero_hpz_partition_size), which do not divide train.workers "
            f"{train.workers}; set it to the GPUs of a node in a file of your own, or use gpu_zero3"
        )
    return copy.deepcopy(config) | {
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": train.precision == "bf16"},
        "steps_per_print": _NEVER,
        # The optimizer is the caller's own `torch.optim.AdamW`. Under CPU offload DeepSpeed accepts it only so.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def with_accumulation(config: dict[str, Any], workers: int, accumulation_steps: int) -> dict[str, Any]:
    """A copy of a complete configuration with its batch sizes, ready for `deepspeed.initialize`.

    Args:
        accumulation_steps: Forward passes of each worker per optimizer step. DeepSpeed divides gradients by this number;
            how many samples a pass holds makes no difference to it, so it is told one.
    """
    return config | {
        "train_batch_size": workers * accumulation_steps,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
    }


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3; 0 if the configuration names none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def workers_of_a_copy(config: dict[str, Any]) -> int:
    """How many workers hold one secondary copy of the weights between them (ZeRO++ hpZ), mostly those of a node; 1 if off."""
    return int(config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))


def quantises_frozen(config: dict[str, Any]) -> bool:
    """Whether ZeRO++ stores frozen weights in 8 bits."""
    return bool(config.get("zero_optimization", {}).get("zero_quantized_nontrainable_weights", False))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer states live outside the accelerator (in host memory or on NVMe)."""
    return _offloads(config, "offload_optimizer")


def offloads_parameters(config: dict[str, Any]) -> bool:
    """Whether the weights live outside the accelerator (stage 3 only)."""
    return _offloads(config, "offload_param")


def _offloads(config: dict[str, Any], key: str) -> bool:
    block = config.get("zero_optimization", {}).get(key) or {}
    return block.get("device", "none") != "none"


def _read(name_or_path: str) -> tuple[str, str]:
    names = config_names()
    if name_or_path in names:
        return f"deepspeed_configs/{name_or_path}.json", (
            files("deepspeed_configs") / f"{name_or_path}.json"
        ).read_text()
    if "/" not in name_or_path and not name_or_path.endswith(".json"):
        hint = nearest(name_or_path, names) or f"; choose one of {', '.join(names)}"
        raise RecipeError(f"train.deepspeed {name_or_path[:100]!r} is no name in deepspeed_configs{hint}")
    try:
        return name_or_path, user_path(name_or_path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"train.deepspeed: {name_or_path} does not exist; give a JSON file or one of {', '.join(names)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"train.deepspeed: {name_or_path[:200]} cannot be read: {one_line(error)}") from None


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return values


def _check_keys(config: dict[str, Any], where: str) -> None:
    for key, value in config.items():
        if key in RECIPE_KEYS:
            raise RecipeError(
                f"{where}: {key} (value {value!r}) belongs to the recipe; remove it and set {RECIPE_KEYS[key]}"
            )
        if key in PIPELINE_KEYS:
            raise RecipeError(f"{where}: {key} (value {value!r}) is set by the pipeline; remove it")
        if key not in KNOWN_KEYS:
            hint = nearest(key, KNOWN_KEYS) or f"; DeepSpeed 0.19.8 knows {', '.join(sorted(KNOWN_KEYS))}"
            raise RecipeError(f"{where}: unknown key {key} (value {value!r}){hint}")


def _check_zero(section: Any, where: str) -> None:
    if section is None:
        return
    if not isinstance(section, dict):
        raise RecipeError(f"{where}: zero_optimization (value {section!r}) must be an object such as {{'stage': 2}}")
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise RecipeError(f"{where}: zero_optimization.stage (value {stage!r}) must be 0, 1, 2 or 3")
    for key, allowed in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        block = section.get(key)
        if block is None:
            continue
        if not isinstance(block, dict):
            raise RecipeError(
                f"{where}: zero_optimization.{key} (value {block!r}) must be an object such as {{'device': 'cpu'}}"
            )
        if stage not in allowed:
            stages = " or ".join(str(number) for number in allowed)
            raise RecipeError(f"{where}: zero_optimization.{key} needs stage {stages}, not stage {stage}")
