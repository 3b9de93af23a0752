"""The shipped DeepSpeed files against the real DeepSpeed, and the refusal of everything a file must not hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.deepspeed import (
    PIPELINE_KEYS,
    RECIPE_KEYS,
    complete_config,
    config_names,
    load_deepspeed_config,
    offloads_optimizer,
    offloads_parameters,
    quantises_frozen,
    with_accumulation,
    workers_of_a_copy,
    zero_stage,
)
from pipeline.config.deepspeed_values import KNOWN_KEYS, TYPES
from pipeline.config.settings import TrainSettings
from pipeline.core.errors import RecipeError

CPU_NAMES = ["cpu_zero0", "cpu_zero1", "cpu_zero2", "cpu_zero3"]
GPU_NAMES = ["gpu_zero1", "gpu_zero2", "gpu_zero3", "gpu_zero3_offload", "gpu_zero3_plusplus"]
REFUSED = ("cpu_zero0", "bf16")


class _LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank update, the shape of what the pipeline trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, 16) / 4)
        self.b = nn.Parameter(torch.zeros(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import deepspeed

    linear = torch.nn.functional.linear
    # Otherwise initialize() compiles this operator for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_init_required=False)
    yield deepspeed
    torch.distributed.destroy_process_group()
    # Stage 3 replaces torch's linear function for the whole process.
    torch.nn.functional.linear = linear
    # DeepSpeed keeps its own references to the group; another test of this process would use the dead one.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.processes
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in CPU_NAMES for precision in ("fp32", "bf16") if (name, precision) != REFUSED],
)
def test_cpu_file_trains(name: str, precision: str, deepspeed: Any) -> None:
    torch.manual_seed(0)
    model = _LowRank().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    frozen = model.base.weight.detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    train = TrainSettings(precision=precision, gradient_clipping=0.0)
    config = with_accumulation(complete_config(load_deepspeed_config(name), train), workers=1, accumulation_steps=2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=0.05), config=config, dist_init_required=False
    )
    assert engine.zero_optimization_stage() == zero_stage(config)
    assert engine.gradient_accumulation_steps() == 2
    x = torch.randn(4, 16, dtype=next(iter(trained)).dtype)
    target = torch.randn(4, 16)
    losses = []
    for _ in range(8):
        loss = (engine(x).float() - target).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    # Two micro-batches make a step, so every second loss shows one update.
    assert losses[0] == losses[1]
    assert losses[1] > losses[2] > losses[4] > losses[6]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        assert torch.equal(engine.module.base.weight.detach().cpu(), frozen)
    engine.destroy()


def test_stage_0_in_bf16_is_refused() -> None:
    name, precision = REFUSED
    with pytest.raises(RecipeError, match=r"ZeRO stage 0.*cpu_zero1, or train\.precision=fp32"):
        complete_config(load_deepspeed_config(name), TrainSettings(deepspeed=name, precision=precision))


@pytest.mark.parametrize("name", CPU_NAMES + GPU_NAMES)
def test_deepspeed_accepts_every_file(name: str, deepspeed: Any) -> None:
    precision = "fp32" if name == REFUSED[0] else "bf16"
    train = TrainSettings(gradient_clipping=0.5, precision=precision, workers=8)
    config = load_deepspeed_config(name)
    parsed = deepspeed.DeepSpeedConfig(
        with_accumulation(complete_config(config, train), workers=1, accumulation_steps=4)
    )
    assert parsed.zero_optimization_stage == zero_stage(config) == int(name.split("zero")[1][0])
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (4, 4)
    assert (parsed.gradient_clipping, parsed.bfloat16_config.enabled) == (0.5, precision == "bf16")
    assert parsed.optimizer_name is None
    assert parsed.zero_config.overlap_comm is name.startswith("gpu")
    assert (parsed.zero_config.offload_optimizer is not None) == offloads_optimizer(config) == name.endswith("offload")
    assert (parsed.zero_config.offload_param is not None) == offloads_parameters(config) == name.endswith("offload")
    assert parsed.zero_config.zero_hpz_partition_size == workers_of_a_copy(config)
    assert parsed.zero_config.zero_quantized_nontrainable_weights is quantises_frozen(config)
    assert quantises_frozen(config) == (workers_of_a_copy(config) == 8) == name.endswith("plusplus")


def test_a_copy_for_more_workers_than_there_are_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"every 8 workers.*do not divide train\.workers 4"):
        complete_config(load_deepspeed_config("gpu_zero3_plusplus"), TrainSettings(workers=4))


def test_every_file_is_listed() -> None:
    assert config_names() == sorted(CPU_NAMES + GPU_NAMES)


class _Recorder(dict[str, Any]):
    def __init__(self, values: dict[str, Any], seen: set[str]) -> None:
        super().__init__(values)
        self.seen = seen

    def __copy__(self) -> _Recorder:
        return _Recorder(self, self.seen)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return _RecordingKeys(self)


class _RecordingKeys:
    def __init__(self, owner: _Recorder) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner


def test_known_keys_are_those_deepspeed_looks_up(deepspeed: Any) -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    seen: set[str] = set()
    deepspeed.DeepSpeedConfig(_Recorder({"train_batch_size": 1}, seen))
    ours = KNOWN_KEYS | set(RECIPE_KEYS) | PIPELINE_KEYS
    assert ours == seen - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)


# What each kind of value is tried with.
PROBES = ["auto", "x", "", 0, 1, 2, -1, 0.5, 1e9, 1e18, True, None, [], {}, {"enabled": True}, "fp32", "cpu"]


def test_the_types_are_those_of_deepspeeds_own_models(deepspeed: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = (
        DeepSpeedZeroConfig,
        DeepSpeedZeroOffloadParamConfig,
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroLeafModuleConfig,
    )
    sections = ("", ".offload_param", ".offload_optimizer", ".leaf_module")
    for model, section in zip(models, sections, strict=True):
        current = {
            field.alias or name
            for name, field in model.model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated"))
        }
        assert set(TYPES[f"zero_optimization{section}"]) == current - {"zenflow"}


def test_what_passes_deepspeed_takes(deepspeed: Any, tmp_path: Path) -> None:
    tried = [
        {section: {name: probe}} if section else {name: probe}
        for section in ("zero_optimization", "aio", "")
        for name in TYPES[section]
        if name != "use_gds"  # for GPUs alone
        for probe in PROBES
        if section or not isinstance(probe, dict)  # DeepSpeed keeps what it read of some whole blocks
    ]
    tried += [
        {"zero_optimization": {"stage": 3, f"offload_{what}": {name: probe}}}
        for what in ("param", "optimizer")
        for name in TYPES[f"zero_optimization.offload_{what}"]
        for probe in PROBES
    ]
    passed = 0
    for config in tried:
        try:
            load_deepspeed_config(_write(tmp_path, config))
        except RecipeError:
            continue
        deepspeed.DeepSpeedConfig({"train_batch_size": 1, **config})
        passed += 1
    assert passed > 100


def _write(folder: Path, config: Any) -> str:
    file = folder / "mine.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(file)


@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_recipe_key_is_refused_by_its_recipe_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_deepspeed_config(_write(tmp_path, {key: 1}))
    for part in (str(tmp_path), key, "belongs to the recipe", RECIPE_KEYS[key]):
        assert part in str(caught.value)
    named = [word for word in RECIPE_KEYS[key].replace("(", " ").replace(")", " ").split() if word.startswith("train.")]
    assert named
    assert {word.removeprefix("train.") for word in named} <= set(TrainSettings.model_fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation .*did you mean zero_optimization"),
        ({"qqqqqq": 1}, "DeepSpeed 0.19.8 knows aio, autotuning, checkpoint"),
        ({"steps_per_print": 5}, "steps_per_print .value 5. is set by the pipeline"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage .value 4. must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "value True"),
        ({"zero_optimization": {"stage": [2]}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "must be an object"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "must be an object such as {'device': 'cpu'}"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size .value 'auto'.: ",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
            "reduce_bucket_size .value 0.: .*greater than or equal to 1",
        ),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": 1.5}},
            "allgather_bucket_size .value 1.5.: .*integer",
        ),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 0}}, "sub_group_size .value 0."),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}, "zero_hpz_partition_size .value 0."),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}},
            "zero_hpz_partition_size .value 'auto'.",
        ),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "overlap_comm .value 'auto'.: .*boolean"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "unknown key zero_optimization.overlap_com .* did you mean overlap_comm",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "offload_optimizer.device .value 'gpu'.: .*'none', 'cpu' or 'nvme'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 2}}},
            "offload_optimizer.ratio .value 2.: .*less than",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "has no nvme_path"),
        ({"aio": {"block_size": "auto"}}, "aio.block_size .value 'auto'."),
        ({"aio": 3}, "aio .value 3."),
        ({"timers": 3}, "timers .value 3."),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor .value 0."),
        ({"communication_data_type": "auto"}, "communication_data_type .value 'auto'.: .*'fp16', 'bf16' or 'fp32'"),
        ({"wall_clock_breakdown": "x"}, "wall_clock_breakdown .value 'x'."),
        ({"flops_profiler": {"enabled": 1.5}}, "flops_profiler.enabled .value 1.5. must be true or false"),
        ({"autotuning": {"x": ["auto"]}}, "autotuning.x is 'auto'"),
        ('{"gradient_predivide_factor": NaN}', "NaN is no number"),
        ('{"aio": ' + "[" * 9999, "is not valid JSON"),
        ('{"vocabulary_size": ' + "9" * 5000 + "}", "is not valid JSON"),
        ([1], "must hold a JSON object, not list"),
        ("{", "is not valid JSON"),
        ('{"aio": {}, "aio": {}}', "'aio' appears twice"),
    ],
)
def test_bad_files_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_deepspeed_config(_write(tmp_path, config))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu_zero_2", "did you mean .*cpu_zero2"),
        ("qqqqqqqq", "choose one of cpu_zero0, cpu_zero1"),
        ("nowhere/x.json", "nowhere/x.json does not exist"),
        ("x.json", "x.json does not exist"),
        ("/", "cannot be read"),
    ],
)
def test_missing_files_are_named(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_deepspeed_config(name)


def test_a_file_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path, {"zero_optimization": {"stage": 1}})
    assert zero_stage(load_deepspeed_config("~/mine.json")) == 1


def test_completing_leaves_the_file_alone() -> None:
    config = load_deepspeed_config("gpu_zero3_offload")
    before = json.dumps(config)
    done = with_accumulation(complete_config(config, TrainSettings(precision="fp32")), workers=4, accumulation_steps=8)
    done["zero_optimization"]["offload_param"]["device"] = "nvme"
    assert json.dumps(config) == before
    assert (done["train_batch_size"], done["gradient_accumulation_steps"]) == (32, 8)
    assert done["bf16"] == {"enabled": False}
    assert (done["zero_force_ds_cpu_optimizer"], done["zero_allow_untested_optimizer"]) == (False, True)


def test_absent_sections_mean_stage_0_without_offload() -> None:
    assert (zero_stage({}), offloads_optimizer({}), offloads_parameters({})) == (0, False, False)
    off = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}
    assert not offloads_optimizer(off)
