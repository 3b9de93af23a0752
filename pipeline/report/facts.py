"""What a report shows: plain facts, gathered by the flow, so that rendering needs no tracking server and no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.results import HarnessRow
    from pipeline.metrics.intervals import Interval


@dataclass(frozen=True)
class StageFacts:
    """One stage of the run. `status` is `computed` or `reused`."""

    name: str
    status: str
    seconds: float
    key: str
    mlflow_run_id: str


@dataclass(frozen=True)
class LayerFacts:
    """What one adapted weight learned, beside what it lost.

    `learned` are the singular values of the update s * B diag(d) A, `dropped` those cut from the base weight, both in
    the weight's own units and descending; `largest` is the base weight's largest singular value. `output_share` is how
    much of the energy of the layer's output the truncation takes, for held-out text.
    """

    name: str
    learned: list[float]
    dropped: list[float]
    largest: float
    output_share: float


@dataclass(frozen=True)
class TruncationFacts:
    """What the truncation costs before training: mean losses in nats over `tokens` held-out tokens.

    `worst` has the layers that lose the largest share of their output, each with the loss when it alone is truncated. With a
    new head (`below_head`) the loss is the share of what the head reads that changes.
    """

    rule: str
    rank: int
    tokens: int
    base_loss: float
    truncated_loss: float
    worst: list[tuple[str, float]]
    warning: str | None
    below_head: bool = False

    @property
    def cost(self) -> float:
        """The rise of the loss in nats per token."""
        return self.truncated_loss - self.base_loss


@dataclass(frozen=True)
class SampleFacts:
    """One held-out prompt with each candidate's answer (`base`, `adapted`, maybe `champion`)."""

    prompt: str
    references: list[str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class ReportFacts:
    """Everything on the page.

    `metrics` maps candidate -> metric -> value, `intervals` to the ends of the value's own 95% interval. `training` holds one record per optimizer step with the keys `step`,
    `loss`, `task_loss`, `singular_value_penalty`, `orthogonality_penalty`, `learning_rate`, `tokens_per_second`,
    `gradient_norm` where DeepSpeed knows it (not at stage 0 without clipping), and `validation_loss` at some steps. `commands` maps a caption to a shell command (use the model, open the MLflow UI).
    """

    title: str
    finished: str
    verdict: str
    promoted: bool
    model_uri: str
    gate_metric: str
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, list[float]]]
    differences: dict[str, Interval]
    harness: list[HarnessRow]
    heldout_rows: int
    truncation: TruncationFacts
    training: list[dict[str, float]]
    layers: list[LayerFacts]
    samples: list[SampleFacts]
    stages: list[StageFacts]
    dataset: dict[str, Any]
    rejected_rows: list[str]
    interruptions: list[str]
    recipe_yaml: str
    versions: dict[str, str]
    machine: dict[str, str]
    commands: dict[str, str] = field(default_factory=dict)
