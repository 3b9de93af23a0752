"""The fine-tuning methods, one entry each, and the `adapter` section of a recipe that chooses among them.

A method is its entry in `METHODS` and the module that the entry names; nothing else in the pipeline lists methods. The
entries hold what is asked before anything is built: by the recipe's checks, the stage graph, the plan, `kasa compare` and
the documentation. Neither torch nor numpy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from kasa.config import KasaConfig, Regulariser, SingularValueStart
from kasa.targets import REGEX_PREFIX
from kasa.truncation import Truncation
from pipeline.config.section import OneOf, Section

if TYPE_CHECKING:
    from kasa.targets import Target

# KaSA: what `kasa run` trains, and what the others are compared with.
REFERENCE = "kasa"

# The settings of `adapter` that a LoRA has a use for.
LOW_RANK = frozenset({"rank", "alpha", "dropout", "targets"})

# Beyond, VeRA's shared projections are larger than its authors used by far, and slower than the base.
_WIDEST_VERA = 1024


class Layers(NamedTuple):
    """Sums over the adapted modules.

    Attributes:
        modules: how many there are.
        outputs: their output features.
        sides: their input and output features.
    """

    modules: int
    outputs: int
    sides: int


def low_rank_parameters(adapter: AdapterSettings, layers: Layers) -> int:
    """A and B of every module: r (in + out)."""
    return adapter.rank * layers.sides


def smallest_side(targets: Sequence[Target]) -> int:
    """The largest rank that a matrix of every target can have."""
    return min(target.smaller_side for target in targets)


@dataclass(frozen=True)
class MethodSpec:
    """What the pipeline knows of a method before it is built.

    Attributes:
        name: as `adapter.method` and `kasa compare --methods` have it.
        summary: one line for people.
        module: the module that builds it. It has `build(recipe, base, targets, spectra, start) -> Method` (see
            `pipeline.methods.method`) and is imported only when the method is built.
        settings: the settings of `adapter` that it has a use for; the others do not count for its results.
        rank_meaning: what `adapter.rank` is to it, where that is not the rank of a LoRA.
        largest_stage: the largest ZeRO stage it can be trained at.
        stage_reason: why not at a larger one.
        only_fp32: why it cannot be trained in bf16; empty where it can.
        components: which components of the base weights the spectra stage computes for it. `dropped`: those that
            `adapter.truncation` takes away; `leading`: the `rank` largest for the calibration text, which it starts from.
        registrable: whether `kasa run` can train it: plan its memory, register its adapters, serve them and warm-start
            from them. The others are for `kasa compare`.
        parameters: how many numbers it trains; None where the base decides, and the module has
            `parameter_count(name, targets, model) -> int`.
        largest_rank: the largest rank it can have on these targets.
    """

    name: str
    summary: str
    module: str
    settings: frozenset[str] = LOW_RANK
    rank_meaning: str = ""
    largest_stage: int = 3
    stage_reason: str = ""
    only_fp32: str = ""
    components: Literal["none", "dropped", "leading"] = "none"
    registrable: bool = False
    parameters: Callable[[AdapterSettings, Layers], int] | None = low_rank_parameters
    largest_rank: Callable[[Sequence[Target]], int] = smallest_side


_PEFT = "pipeline.methods.peft"
_RESIDUAL = "pipeline.methods.residual"
_TAKES_APART = "it takes whole base weights apart"

_SPECS = (
    MethodSpec(
        REFERENCE,
        "B diag(d) A beside a base without its least useful components (arXiv 2412.06071)",
        "pipeline.methods.kasa",
        settings=LOW_RANK
        | {
            "truncation",
            "truncation_rank",
            "regulariser",
            "singular_values",
            "singular_value_start",
            "singular_value_weight",
            "orthogonality_weight",
        },
        components="dropped",
        registrable=True,
        parameters=lambda adapter, layers: (
            adapter.rank * (layers.sides + (layers.modules if adapter.singular_values else 0))
        ),
    ),
    MethodSpec("lora", "B A beside the base (arXiv 2106.09685)", _PEFT),
    MethodSpec("rslora", "LoRA scaled by alpha / sqrt(r) (arXiv 2312.03732)", _PEFT),
    MethodSpec(
        "dora",
        "LoRA of the weights' direction, with their magnitudes learned beside (arXiv 2402.09353)",
        _PEFT,
        parameters=lambda adapter, layers: adapter.rank * layers.sides + layers.outputs,
    ),
    MethodSpec(
        "pissa",
        "LoRA that starts from the largest singular triplets (arXiv 2404.02948)",
        _RESIDUAL,
        largest_stage=2,
        stage_reason=_TAKES_APART,
    ),
    MethodSpec(
        "milora",
        "LoRA that starts from the smallest singular triplets (arXiv 2406.09044)",
        _RESIDUAL,
        largest_stage=2,
        stage_reason=_TAKES_APART,
    ),
    MethodSpec(
        "olora",
        "LoRA that starts from the first columns of a QR decomposition (arXiv 2406.01775)",
        _RESIDUAL,
        largest_stage=2,
        stage_reason=_TAKES_APART,
    ),
    MethodSpec(
        "corda",
        "LoRA that starts from the components that count most for the calibration text (arXiv 2406.05223)",
        _RESIDUAL,
        largest_stage=2,
        stage_reason=_TAKES_APART,
        components="leading",
    ),
    MethodSpec(
        "adalora",
        "B diag(d) A whose ranks are shared out among the modules during training (arXiv 2303.10512)",
        "pipeline.methods.adalora",
        rank_meaning="the rank it ends with on average",
        largest_stage=0,
        stage_reason="it needs whole gradients between steps",
        only_fp32="in bf16 DeepSpeed keeps the gradients to itself",
        parameters=lambda adapter, layers: adapter.adalora_first_rank * (layers.sides + layers.modules),
    ),
    MethodSpec(
        "vera",
        "learned scales of random projections that all modules share (arXiv 2310.11454)",
        _PEFT,
        settings=LOW_RANK - {"alpha"},
        rank_meaning="the width of its frozen projections",
        parameters=lambda adapter, layers: adapter.rank * layers.modules + layers.outputs,
        largest_rank=lambda targets: _WIDEST_VERA,
    ),
    MethodSpec(
        "fourierft",
        "a few Fourier coefficients of each update (arXiv 2405.03003)",
        _PEFT,
        settings=frozenset({"rank", "targets"}),
        rank_meaning="the number of coefficients a module",
        parameters=lambda adapter, layers: adapter.rank * layers.modules,
        largest_rank=lambda targets: min(target.in_features * target.out_features for target in targets),
    ),
    MethodSpec(
        "ia3",
        "learned scales of the modules' outputs or inputs (arXiv 2205.05638)",
        _PEFT,
        settings=frozenset({"targets"}),
        parameters=None,
    ),
    MethodSpec(
        "layernorm",
        "the base's own normalisation layers (arXiv 2312.11420)",
        _PEFT,
        settings=frozenset(),
        largest_stage=2,
        stage_reason="it copies whole weights of the base",
        parameters=None,
    ),
    MethodSpec("full", "every parameter of the base", "pipeline.methods.full", settings=frozenset(), parameters=None),
)
METHODS = {spec.name: spec for spec in _SPECS}

_DEFAULTS = KasaConfig()


def _rank_description() -> str:
    meanings = [f"of `{spec.name}` {spec.rank_meaning}" for spec in _SPECS if spec.rank_meaning]
    return f"Adapter rank r; {', '.join(meanings)}."


class AdapterSettings(Section):
    """What is trained: the KaSA adapter (arXiv 2412.06071), or another method to compare it with."""

    method: Annotated[str, OneOf("method", METHODS)] = Field(
        REFERENCE,
        description="Another one than `kasa` is for `kasa compare` (docs/compare.md) and has a use for `rank`, `alpha`, "
        "`dropout` and `targets` at most.",
    )
    rank: int = Field(_DEFAULTS.rank, ge=1, description=_rank_description())
    alpha: float = Field(
        _DEFAULTS.alpha, gt=0, description="Scale numerator; the update is multiplied by alpha / rank."
    )
    dropout: float = Field(_DEFAULTS.dropout, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: str | list[str] = Field(
        "all-linear",
        description="`all-linear`, module names such as `[q_proj, v_proj]`, or a regular expression `re:...` on full names.",
    )
    truncation: Truncation = Field(
        _DEFAULTS.truncation,
        description="What is dropped from each base weight. `loss`: what matters least to the base's loss on the "
        "calibration text; `activation`: what matters least to the layer's output there; `weight`: the smallest singular "
        "triplets (the paper's rule); `authors`: as `weight`, but wide weights stay whole (the authors' code); `none`: "
        "nothing.",
    )
    truncation_rank: int | None = Field(None, ge=1, description="The rank of what is dropped; default: `rank`.")
    regulariser: Regulariser = Field(
        _DEFAULTS.regulariser,
        description="`paper`: r x r Gram matrices, summed over layers. `authors`: in x in and out x out, averaged over "
        "layers, as in the code that the published weights belong to.",
    )
    singular_values: bool = Field(
        _DEFAULTS.singular_values,
        description="Learn d, the singular values of the update; `false` leaves B A, without their regulariser L2.",
    )
    singular_value_start: SingularValueStart = Field(
        _DEFAULTS.singular_value_start,
        description="Where a learned d starts. `ones`: each direction learns as fast as in LoRA; `normal`: at random, as in the "
        "paper, and a direction learns in proportion to the size of its d.",
    )
    singular_value_weight: float = Field(
        _DEFAULTS.singular_value_weight, ge=0, description="beta, the weight of the L2 term on d."
    )
    orthogonality_weight: float = Field(
        _DEFAULTS.orthogonality_weight, ge=0, description="gamma, the weight of the orthogonality term L3."
    )

    @field_validator("targets")
    @classmethod
    def _names_something(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and value.startswith(REGEX_PREFIX):
            try:
                re.compile(value.removeprefix(REGEX_PREFIX))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"no regular expression: {error}") from None
        if not value:
            raise ValueError("no module is named; leave the key out for all linear modules")
        return value

    @property
    def spec(self) -> MethodSpec:
        """The catalogue's entry of the method."""
        return METHODS[self.method]

    @property
    def adalora_first_rank(self) -> int:
        """The rank that AdaLoRA begins with, to end at `rank` on average: half as much again, as in its authors' settings."""
        return (3 * self.rank + 1) // 2
