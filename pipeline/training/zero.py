"""The one door to DeepSpeed: an engine at any ZeRO stage, and whole tensors in and out of it.

At stages 1 to 3 the optimizer state is partitioned over the ranks, at stage 3 the parameters too. The functions here gather
and scatter them, so that checkpoints depend neither on the stage nor on the number of workers. All of them are collective:
every rank must call them, in the same order.

Training checkpoints of our own: safetensors and JSON, complete or absent, whatever ZeRO stage and number of workers.

DeepSpeed's checkpoints are pickles, and those of stages 1 to 3 load at the same number of workers only.

A checkpoint holds the adapter and AdamW's moments in fp32, and the state of a method that allocates its budget between
steps. Nothing else is state: learning rate, sample order and dropout are functions of the step and the seed.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d

from kasa.errors import AdapterFileError
from kasa.folders import read_tensor_folder, write_tensor_folder
from pipeline.config.deepspeed import zero_stage

MOMENTS = ("exp_avg", "exp_avg_sq")
# Key of an optimizer group: whether it holds the parameters of a new head.
IS_HEAD = "is_head"


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Partition models that are loaded within the block as they are read, if `config` asks for stage 3."""
    if zero_stage(config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # Until DeepSpeed has taken over the process group it assumes one rank, and refuses the batch size of more.
    _deepspeed().init_distributed(dist_init_required=False)
    # A local name, since transformers holds it by a weak reference only. The model's dtype follows `config` from here on.
    announcement = HfDeepSpeedConfig(config)
    yield
    del announcement


def start_engine(
    model: nn.Module,
    config: dict[str, Any],
    weight_decay: float,
    timeout_s: float,
    head: Iterable[nn.Parameter] = (),
) -> Any:
    """A DeepSpeed engine that trains the parameters of a model that require gradients; torch's process group must exist.

    Args:
        model: the model with the method attached.
        config: a complete DeepSpeed configuration.
        weight_decay: of AdamW.
        timeout_s: seconds that a rank waits for another in a collective operation.
        head: the parameters of a new head, which have a learning rate of their own.

    Returns:
        The engine, with learning rate 0 until `set_learning_rate`.
    """
    deepspeed = _deepspeed()
    if config["bf16"]["enabled"]:
        _round_to_bf16(model)
    in_head = {id(parameter) for parameter in head}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if (id(parameter) in in_head) == is_head], IS_HEAD: is_head}
        for is_head in ([False, True] if in_head else [False])
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if len(groups) > 1 and engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed links parameters to AdamW's state after the step of the first group, when the second group has none yet.
        _create_partitioned_state(engine, 0)
    # DeepSpeed creates process groups of its own, with torch's default time-out of half an hour.
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    return engine


def _round_to_bf16(model: nn.Module) -> None:
    """Round all parameters that stage 3 has not partitioned.

    Where it loaded the base partitioned, DeepSpeed leaves the dtype of everything else alone: the adapter would compute in
    fp32 and keep an fp32 copy of each of its inputs. At the other stages DeepSpeed rounds as well, before it makes the fp32
    master copy; so the master copy starts from the same values at every stage.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def element_count(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter on all ranks together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def set_learning_rate(engine: Any, rate: float, head_rate: float | None = None) -> None:
    """Set the learning rate of the next step; the head's too, if it is another."""
    for group in engine.optimizer.param_groups:
        group["lr"] = head_rate if head_rate is not None and group[IS_HEAD] else rate


def gathered(engine: Any, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Make parameters whole on every rank within the block; outside it stage 3 leaves them empty.

    A penalty on them needs the block around its backward pass too, or the shapes of its gradients do not fit.
    """
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(list(parameters), modifier_rank=None)


def whole_parameters(engine: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The values of trainable parameters by name: fp32, on the CPU."""
    if engine.zero_optimization_stage() == 0:
        return {name: _on_cpu(parameter) for name, parameter in parameters.items()}
    read = _deepspeed().utils.safe_get_full_fp32_param
    return {name: _on_cpu(read(parameter)) for name, parameter in parameters.items()}


def whole_moments(engine: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's moments after at least one step, as `exp_avg/NAME` and `exp_avg_sq/NAME`: fp32, on the CPU."""
    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state
        return {f"{moment}/{name}": _on_cpu(state[p][moment]) for name, p in parameters.items() for moment in MOMENTS}
    read = _deepspeed().utils.safe_get_full_optimizer_state
    return {f"{moment}/{name}": _on_cpu(read(p, moment)) for name, p in parameters.items() for moment in MOMENTS}


def restore_state(
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    values: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    steps_done: int,
) -> None:
    """Restore parameters and AdamW's state.

    Args:
        engine: an engine that has not trained yet.
        parameters: its trainable parameters by name.
        values: what `whole_parameters` returned.
        moments: what `whole_moments` returned.
        steps_done: AdamW's steps at that time, for its bias correction.
    """
    if engine.zero_optimization_stage() == 0:
        for name, parameter in parameters.items():
            own = {moment: moments[f"{moment}/{name}"].to(parameter.device).clone() for moment in MOMENTS}
            engine.optimizer.state[parameter] = {"step": torch.tensor(float(steps_done)), **own}
            parameter.data.copy_(values[name])
        return
    _restore_module(engine, parameters, values)
    _create_partitioned_state(engine, steps_done)
    for name, parameter in parameters.items():
        # The fp32 master copy has to be written too: the engine made it from parameters already rounded to bf16.
        _write_partition(engine, parameter, values[name])
        for moment in MOMENTS:
            _write_partition(engine, parameter, moments[f"{moment}/{name}"], moment)


def _write_partition(engine: Any, parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Write this rank's part of a whole value: of the fp32 master copy, or of one of its moments."""
    utils = _deepspeed().utils
    if engine.zero_optimization_stage() < 3:
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        return
    # All ranks have parts of one size, so the last may reach beyond the end. DeepSpeed's `safe_set_full_*` fail on such
    # values, though its `safe_get_full_*` read them.
    partitioned: Any = parameter
    size, rank = partitioned.ds_tensor.numel(), engine.optimizer._get_param_partition_rank(parameter)
    part = value.flatten()[rank * size : (rank + 1) * size]
    part = nn.functional.pad(part, (0, size - part.numel()))
    if moment is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, moment)


def _restore_module(engine: Any, parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Write the model's own copy, which the next forward pass uses. DeepSpeed copies it from the master copy after a step only."""
    if engine.zero_optimization_stage() < 3:
        for name, parameter in parameters.items():
            parameter.data.copy_(values[name])
        return
    with _deepspeed().zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        for name, parameter in parameters.items():
            parameter.data.copy_(values[name])


def _create_partitioned_state(engine: Any, steps_done: int) -> None:
    """Create AdamW's state, as its first step would; before that there is nothing to restore into."""
    zero = engine.optimizer
    third = engine.zero_optimization_stage() == 3
    for partition in zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups:
        state = zero.optimizer.state[partition]
        # Tensors that are there already stay: parameters may be linked to them.
        state |= {moment: torch.zeros_like(partition) for moment in MOMENTS if moment not in state}
        state["step"] = torch.tensor(float(steps_done))
    if not third:
        # Links parameters to the state, which DeepSpeed does after the first step otherwise.
        zero._lazy_init_hp_params_optimizer_state()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # `initialize` would compile it for half a minute, and fail without a compiler, for an inference collective that training
    # never calls. A private table, so the version of DeepSpeed is pinned.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


_JSON = "checkpoint.json"
_ALLOCATION = "allocation/"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training.

    Attributes:
        step: optimizer steps done.
        values: the trained tensors by name.
        moments: AdamW's, as `exp_avg/NAME` and `exp_avg_sq/NAME`.
        allocation: the state of `Adapted.allocation`.
    """

    step: int
    values: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    allocation: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(root: Path, checkpoint: Checkpoint, kept: int, best: int | None = None) -> None:
    """Write `root/step-N`, then remove older checkpoints and what interrupted writers left.

    Args:
        root: folder of all checkpoints.
        checkpoint: what to write.
        kept: how many of the newest checkpoints stay.
        best: a step whose checkpoint stays too.
    """
    allocation = {f"{_ALLOCATION}{name}": tensor for name, tensor in checkpoint.allocation.items()}
    tensors = {**checkpoint.values, **checkpoint.moments, **allocation}
    write_tensor_folder(_folder(root, checkpoint.step), _JSON, {"step": checkpoint.step}, tensors)
    for old in _complete(root)[:-kept]:
        if _step(old) != best:
            shutil.rmtree(old)
    for orphan in root.glob(".step-*.partial"):
        shutil.rmtree(orphan, ignore_errors=True)


def newest_step(root: Path, at_most: float = math.inf) -> int:
    """The step of the newest checkpoint up to step `at_most`; 0 where there is none."""
    return max((step for step in map(_step, _complete(root)) if step <= at_most), default=0)


def newest_sound_checkpoint(root: Path, at_most: float = math.inf) -> Checkpoint | None:
    """The newest readable checkpoint up to step `at_most`, if any; newer ones that are damaged are removed."""
    while step := newest_step(root, at_most):
        try:
            return load_checkpoint(root, step)
        except AdapterFileError:
            shutil.rmtree(_folder(root, step))
    return None


def load_checkpoint(root: Path, step: int) -> Checkpoint:
    """Read `root/step-N`.

    Raises:
        AdapterFileError: the checkpoint is damaged.
    """
    facts, tensors = read_tensor_folder(_folder(root, step), _JSON)
    allocation = {n.removeprefix(_ALLOCATION): t for n, t in tensors.items() if n.startswith(_ALLOCATION)}
    moments = {n: t for n, t in tensors.items() if "/" in n and not n.startswith(_ALLOCATION)}
    values = {n: t for n, t in tensors.items() if "/" not in n}
    return Checkpoint(facts["step"], values, moments, allocation)


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:07d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _complete(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("step-*") if (folder / _JSON).exists())
