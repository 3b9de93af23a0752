"""What the values in a DeepSpeed file must be, so that a wrong one is refused before anything is computed.

DeepSpeed is not imported: that takes seconds, and the driver may not have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from kasa.errors import nearest
from pipeline.core.errors import RecipeError

# The top-level keys that DeepSpeed 0.19.8 reads, apart from the recipe's and the pipeline's. A test compares this list with the keys
# that DeepSpeedConfig really looks up.
KNOWN_KEYS = frozenset(
    {
        "aio",
        "autotuning",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "memory_breakdown",
        "pipeline",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_optimization",
    }
)

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Block = dict[str, Any]

# What the values of DeepSpeed 0.19.8 must be, by section, "" being the top level. DeepSpeed checks some of them when training
# starts, reads "auto" as its default or as a text, and divides by others, which must not be 0.
# ZenFlow is left out: it would put an optimizer of its own in place of the recipe's. A test holds the first four
# sections against DeepSpeed's own models, and what passes here against what DeepSpeed takes.
_OFFLOAD = {
    "device": Literal["none", "cpu", "nvme"],
    "nvme_path": str,
    "buffer_count": Count,
    "pin_memory": Flag,
}
TYPES: dict[str, dict[str, Any]] = {
    "zero_optimization": {
        "stage": Size,
        **dict.fromkeys(
            (
                "contiguous_gradients",
                "reduce_scatter",
                "use_multi_rank_bucket_allreduce",
                "allgather_partitions",
                "overlap_comm",
                "compute_grad_norm",
                "load_from_fp32_weights",
                "elastic_checkpoint",
                "stage3_gather_16bit_weights_on_model_save",
                "stage3_use_all_reduce_for_fetch_params",
                "stage3_allgather_sequential",
                "ignore_unused_parameters",
                "legacy_stage1",
                "round_robin_gradients",
                "parameter_alignment",
                "zero_quantized_weights",
                "zero_quantized_nontrainable_weights",
                "zero_quantized_gradients",
                "memory_efficient_linear",
                "pipeline_loading_checkpoint",
                "override_module_apply",
                "log_trace_cache_warnings",
                "enable_sanity_checks",
                "save_muon_momentum_buffer_in_memory",
            ),
            Flag,
        ),
        **dict.fromkeys(
            ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size"), Count
        ),
        **dict.fromkeys(
            (
                "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold",
                "stage3_model_persistence_threshold",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
                "stage3_module_granularity_threshold",
            ),
            Size,
        ),
        **dict.fromkeys(("offload_param", "offload_optimizer", "leaf_module"), Block),
    },
    "zero_optimization.offload_param": _OFFLOAD | {"buffer_size": Count, "max_in_cpu": Size},
    "zero_optimization.offload_optimizer": _OFFLOAD
    | dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), Flag)
    | dict.fromkeys(("ratio", "cpuadam_cores_perc"), Share),
    "zero_optimization.leaf_module": dict.fromkeys(("classes", "names", "name_suffixes"), list[str]),
    "aio": dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), Count)
    | dict.fromkeys(("single_submit", "overlap_events", "use_gds"), Flag),
    "": {
        **dict.fromkeys(KNOWN_KEYS, Block),
        **dict.fromkeys(
            (
                "dataloader_drop_last",
                "disable_allgather",
                "disable_python_gc",
                "dump_state",
                "memory_breakdown",
                "prescale_gradients",
                "use_data_before_expert_parallelism",
                "wall_clock_breakdown",
            ),
            Flag,
        ),
        "vocabulary_size": Count,
        "sequence_parallel_size": Literal[1],  # each worker has samples of its own here
        **dict.fromkeys(
            ("communication_data_type", "seq_parallel_communication_data_type"), Literal["fp16", "bf16", "fp32"]
        ),
        "gradient_predivide_factor": Annotated[float, Field(gt=0)],
        "gradient_allreduce_op": Literal["mean"],  # a sum would be another training
        "log_level": Literal["debug", "info", "warning", "error", "critical"],
    },
}


def check_values(config: dict[str, Any], where: str) -> None:
    """Hold every value of known type against it; "auto" and switches that are no switches are refused wherever they stand.

    Raises:
        RecipeError: naming the file (`where`), the key and the value.
    """
    for section, types in TYPES.items():
        block: Any = config
        for part in filter(None, section.split(".")):
            block = block.get(part)
            if block is None:
                break
        if block is None:
            continue
        try:
            _model(section).model_validate(block)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_in_words(error, section, types)}") from None
    for path, value in _leaves(config, ()):
        if value == "auto" and path[-1] != "keep_in_fp32_modules":
            raise RecipeError(f"{where}: {'.'.join(path)} is 'auto', which only transformers fills in; give the value")
        if path[-1] == "enabled" and not isinstance(value, bool):
            raise RecipeError(f"{where}: {'.'.join(path)} (value {value!r}) must be true or false")
    for key in ("offload_optimizer", "offload_param"):
        offload = (config.get("zero_optimization") or {}).get(key) or {}
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise RecipeError(
                f"{where}: zero_optimization.{key} goes to NVMe and has no nvme_path; name the disk's folder"
            )


@cache
def _model(section: str) -> type[BaseModel]:
    fields: dict[str, Any] = {name: (kind, None) for name, kind in TYPES[section].items()}
    return create_model("Values", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def _in_words(error: ValidationError, section: str, types: Collection[str]) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    dotted = ".".join(filter(None, (section, name)))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted} (value {problem['input']!r}){nearest(name, types)}"
    return f"{dotted} (value {problem['input']!r}): {problem['msg']}"


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, (*path, name))
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, path)
    else:
        yield path, value
