"""The `evaluate` and `promotion` sections of a recipe: what is measured on held-out samples, and what a new version must show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kasa.errors import nearest
from pipeline.config.settings import Section, StrList
from pipeline.metrics import catalogue


class HarnessSettings(Section):
    """Tasks of lm-evaluation-harness, beside the held-out samples (the extra `harness`)."""

    tasks: StrList = Field(
        default_factory=list,
        description="Which tasks or groups of tasks, such as `[arc_easy, hellaswag]`. Default: none.",
    )
    include: str | None = Field(None, description="A folder with task files of your own.")
    limit: int | None = Field(None, ge=1, description="How many documents of each task. Default: all.")


class EvaluateSettings(Section):
    """The comparison of base, adapter and champion on held-out samples."""

    kind: Literal["text", "answer", "choice", "loss", "classification", "regression"] = Field(
        "text",
        description=f"`text`: generated prose, scored by {catalogue.labels_of_text()}; `answer`: generated answers, right or "
        "wrong; `choice`: one of several given answers; `loss`: loss and perplexity alone, of any data. With a new "
        "`base.head` it is that head's kind.",
    )
    metrics: StrList = Field(
        default_factory=list,
        description=f"For `text`, what is measured beside: {catalogue.optional_of_text()}.",
    )
    choices: list[str] = Field(
        default_factory=list,
        description="For `choice`: the answers to choose from, where they are the same for all samples. Default: those of "
        "each row (`data.form` `multiple-choice` or `llm-adapters`).",
    )
    extract: bool = Field(
        False,
        description="For `choice`: generate an answer as well, and measure `accuracy_generated` by the first choice it "
        "names.",
    )
    metric: str | None = Field(
        None,
        description="What promotion is decided on, of the metrics that are measured. Default: "
        f"{catalogue.deciding_names()}, as the kind has it.",
    )
    workers: int = Field(1, ge=1, description="Evaluation processes; the samples are shared out among them.")
    batch_size: int = Field(16, ge=1, description="Samples per forward pass or generated batch.")
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer in tokens.")
    samples_shown: int = Field(8, ge=0, description="Generations shown side by side in the report.")
    harness: HarnessSettings = Field(
        default_factory=HarnessSettings, description="Tasks of lm-evaluation-harness for every candidate."
    )

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that are compared, in the order people read them."""
        return catalogue.measured(self.kind, {*self.metrics, *(["accuracy_generated"] if self.extract else [])})

    @property
    def gate_metric(self) -> str:
        """The metric that decides promotion."""
        return self.metric or catalogue.deciding(self.kind)

    @property
    def generates(self) -> bool:
        """Whether every sample needs a generated answer."""
        return self.kind in ("text", "answer") or self.extract

    @model_validator(mode="after")
    def _settings_suit_the_kind(self) -> EvaluateSettings:
        for name in self.metrics:
            if name not in (known := catalogue.of_text_alone()):
                hint = nearest(name, known) or f"; choose from {', '.join(known)}"
                raise ValueError(f"metrics: there is no {name!r} of generated text{hint}")
        for setting, kind in (("metrics", "text"), ("choices", "choice"), ("extract", "choice")):
            if getattr(self, setting) and self.kind != kind:
                raise ValueError(f"{setting} belong{'s' if setting == 'extract' else ''} to kind: {kind}")
        if len(self.choices) == 1 or len(set(self.choices)) != len(self.choices):
            raise ValueError("choices need at least two different answers")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("choices must not be empty")
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self) -> EvaluateSettings:
        if self.gate_metric not in self.measured:
            raise ValueError(
                f"metric {self.gate_metric} is not measured here; choose one of {', '.join(sorted(self.measured))}"
            )
        return self


class PromotionSettings(Section):
    """What a new version has to show before it becomes the champion; against the base, and the champion there is."""

    margin: float = Field(
        0.0,
        ge=0,
        description="The gain in `evaluate.metric` that the whole 95% interval must lie above, in the metric's unit: "
        f"{catalogue.scales()}, `loss` is in nats (of a regression: the mean squared error).",
    )
    guards: dict[str, float] = Field(
        default_factory=dict,
        description="Other metrics that must not get worse, each with the largest fall allowed (of `loss`: the largest "
        "rise), such as `{loss: 0.02}`; the whole 95% interval must lie within it.",
    )
