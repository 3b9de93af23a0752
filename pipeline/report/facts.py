"""The contents of a report as plain values, so that rendering needs no tracking server and no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.results import HarnessRow
    from pipeline.metrics.intervals import Interval


@dataclass(frozen=True)
class StageFacts:
    """One stage of the run; `status` is `computed` or `reused`."""

    name: str
    status: str
    seconds: float
    key: str
    mlflow_run_id: str


@dataclass(frozen=True)
class LayerFacts:
    """What one adapted weight learned, beside what it lost.

    Attributes:
        name: name of the layer.
        learned: singular values of the update s * B diag(d) A, in the weight's units, descending.
        dropped: singular values that truncation took from the base weight, likewise.
        largest: the base weight's largest singular value.
        output_share: share of the energy of the layer's output that truncation takes, on held-out text.
    """

    name: str
    learned: list[float]
    dropped: list[float]
    largest: float
    output_share: float


@dataclass(frozen=True)
class TruncationFacts:
    """The cost of the truncation before training: mean losses in nats over `tokens` held-out tokens.

    `worst` has the layers that lose the largest share of their output, each with the loss when it alone is truncated. With a
    new head (`below_head`) the loss is the share of the head's input features that changes.
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

    Attributes:
        title: name of the recipe.
        finished: when the run finished.
        verdict: the gate's reason.
        promoted: whether the model became the champion.
        model_uri: URI of the registered version.
        gate_metric: the metric that the gate decided on.
        metrics: candidate -> metric -> value.
        intervals: candidate -> metric -> both ends of the value's own 95% interval.
        differences: metric -> adapted - base.
        harness: results of lm-evaluation-harness.
        heldout_rows: number of held-out samples.
        truncation: the cost of the truncation.
        training: a record per optimizer step with `step`, `loss`, `task_loss`, `singular_value_penalty`,
            `orthogonality_penalty`, `learning_rate`, `tokens_per_second`, `gradient_norm` where DeepSpeed computes it (not at
            stage 0 without clipping), and `validation_loss` at some steps.
        layers: what each layer learned and lost.
        samples: held-out prompts with the candidates' answers.
        stages: the stages of the run.
        dataset: summary of the prepared data.
        rejected_rows: rows of the data that were rejected, with the reason.
        interruptions: what interrupted the training.
        recipe_yaml: the resolved recipe.
        versions: package -> version.
        machine: hardware and operating system of the run.
        commands: caption -> shell command (use the model, open the MLflow UI).
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
