"""The hardware that a run is planned for, from the options of `kasa plan`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.apps.planning.compute import ACCELERATORS, Accelerator
from pipeline.config.deepspeed import config_names
from pipeline.config.recipe import Recipe, parse_recipe, recipe_values
from pipeline.core.errors import RecipeError


@dataclass(frozen=True)
class Hardware:
    """The hardware of one training worker.

    Attributes:
        gpu_memory_gib: memory of its GPU; None leaves open what fits.
        peak_tflops: its peak in the recipe's precision; None leaves the time open.
        utilisation: the share of the peak that training reaches.
    """

    gpu_memory_gib: float | None = None
    peak_tflops: float | None = None
    utilisation: float = 0.4


def hardware_of(
    recipe: Recipe,
    gpus: int | None,
    nodes: int,
    gpu: str | None,
    gpu_memory_gib: float | None,
    peak_tflops: float | None,
    utilisation: float,
) -> tuple[Recipe, Hardware]:
    """The recipe on as many GPUs as the options of `kasa plan` name, and the hardware that they describe.

    Args:
        recipe: the resolved recipe.
        gpus: GPUs on each node; None keeps the recipe's workers.
        nodes: number of nodes.
        gpu: name of the GPU, which sets its memory and peak.
        gpu_memory_gib: memory of one GPU, if it is not that of the name.
        peak_tflops: peak of one worker, if it is not that of the name.
        utilisation: the share of the peak that training reaches.

    Raises:
        RecipeError: the options contradict one another or the recipe, or name an unknown GPU.
    """
    if gpus is None and nodes > 1:
        raise RecipeError(f"--nodes {nodes} needs --gpus, the number of GPUs on each")
    if gpus is not None:
        recipe = _on_gpus(recipe, gpus, nodes)
    if not recipe.train.gpu and (gpu or gpu_memory_gib):
        raise RecipeError("the recipe trains without GPUs; give --gpus N or train.gpu=true")
    known = find_accelerator(gpu) if gpu else None
    if known and recipe.train.precision == "bf16":
        peak_tflops = peak_tflops or known.bf16_tflops
    memory_gib = gpu_memory_gib or (known.memory_gib if known else None)
    return recipe, Hardware(memory_gib, peak_tflops, utilisation)


def find_accelerator(name: str) -> Accelerator:
    """A GPU by its name, upper or lower case.

    Raises:
        RecipeError: it is not in the table.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        names = ", ".join(accelerator.name for accelerator in ACCELERATORS.values())
        raise RecipeError(
            f"--gpu {name!r} is not in the table ({names}); give --gpu-memory-gib and --peak-tflops instead"
        )
    return found


def _on_gpus(recipe: Recipe, gpus: int, nodes: int) -> Recipe:
    """The recipe with a worker for each GPU; a `cpu_...` configuration becomes its `gpu_...` counterpart."""
    values = recipe_values(recipe)
    deepspeed = recipe.train.deepspeed
    counterpart = deepspeed.replace("cpu_", "gpu_", 1)
    values["train"] |= {
        "gpu": True,
        "workers": gpus * nodes,
        "deepspeed": counterpart if counterpart in config_names() else deepspeed,
    }
    if "precision" not in recipe.train.model_fields_set:
        values["train"]["precision"] = "auto"
    return parse_recipe(values, f"--gpus {gpus} --nodes {nodes}")
