"""The sections of a recipe, but for `adapter`, which stands in `pipeline.config.methods`.

The `description` of every field is its documentation: `docs/recipe.md` is generated from it (`make docs`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kasa.errors import nearest
from pipeline.config.section import (
    LARGEST_RATE,
    LARGEST_SEED,
    WEEK_S,
    CpuShare,
    NamedAbove,
    PathText,
    PlainName,
    Section,
    StrList,
)
from pipeline.core.machine import fast_precision
from pipeline.metrics import catalogue

HeadKind = Literal["language-model", "classification", "regression"]


class AboutSettings(Section):
    """What people should know of a recipe; it changes nothing."""

    _remarks: ClassVar[bool] = True

    summary: str = Field("", description="The task and the model in a few words.")
    settings: Literal["published", "adapted", "ours"] = Field(
        "ours",
        description="Where the training settings come from. `published`: with the method's paper or code; `adapted`: from "
        "another published work on the same task; `ours`: chosen here.",
    )
    differences: str = Field("", description="What is not as published.")
    published: dict[str, float] = Field(default_factory=dict, description="The published result: metric -> value in %.")


class BaseSettings(Section):
    """Which pretrained model is adapted."""

    model: str = Field(
        "embedded:smollm2-135m-instruct",
        description="A local Hugging Face folder, a hub id, or `embedded:NAME`. Weights are safetensors, or `pytorch_model.bin`, "
        "which is stored once more as safetensors. Code that comes with a model is never run.",
    )
    revision: str | None = Field(None, description="Hub revision; leave out for local folders.")
    head: HeadKind = Field(
        "language-model",
        description="`classification` and `regression` give the base, an encoder such as RoBERTa or a causal model, a new head "
        "with as many classes as the data has; all of it is trained beside the adapter and saved with it.",
    )


class DataSettings(Section):
    """Where the text comes from and how it becomes tokens."""

    train: StrList = Field(
        min_length=1,
        description="Files, globs, folders, `hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT]`, `https://...` or `embedded:NAME`. jsonl, json, csv, parquet, txt.",
    )
    heldout: StrList = Field(default_factory=list, description="The held-out source; empty: split off from `train`.")
    calibration: StrList = Field(
        default_factory=list,
        description="Text that `adapter.truncation` looks at, in the form of `train`; empty: `train` itself.",
    )
    form: Annotated[str, NamedAbove("pipeline.data.forms")] = Field(
        "auto",
        description="How rows are read; `auto` decides by the columns of the first row. `labelled`, a text or a pair of them "
        "with a label, is the form for a new `base.head`; `package.module:function` is a function of yours from row to conversation.",
    )
    labels: list[str] = Field(
        default_factory=list,
        description="The names of the classes, in the order of their numbers in the data; empty: as the data has them.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames: the form's field -> the data's column, e.g. `{prompt: question, completion: answer}`.",
    )
    group_references: bool = Field(
        False,
        description="Held-out samples of one prompt become one sample with all their references, as E2E is scored. The "
        "loss is that of one of them, chosen by hash. In training each reference stays a sample of its own.",
    )
    separator: str | None = Field(
        None,
        description="Text files only: splits each line into prompt and completion at its first occurrence.",
    )
    prompt_template: str = Field(
        "{prompt}",
        description="Wraps each prompt; `{prompt}` marks its place. Without a chat template the answer follows at once, so end with a space or a line break.",
    )
    chat_template: bool | None = Field(
        None, description="Use the tokenizer's chat template; default: where the tokenizer has one."
    )
    system_prompt: str | None = Field(
        None, description="A system message put before every prompt (chat template only)."
    )
    learn: Literal["all", "last"] = Field(
        "all",
        description="Which answers of a conversation are learned. Without a chat template only the last one ever is.",
    )
    train_on_prompt: bool = Field(
        False,
        description="Learn prompts as well as answers; held-out samples are judged by their answers all the same.",
    )
    max_tokens: int = Field(
        512, ge=8, description="Longest sample in tokens, prompt and completion; longer rows are rejected."
    )
    max_rejected_share: float = Field(
        0.01, ge=0, le=1, description="Share of rows that may be unusable before the run stops."
    )
    heldout_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the distinct prompts held out, if neither a source nor `heldout_rows` is named.",
    )
    train_rows: int | None = Field(None, ge=1, description="Use at most this many training samples (after the split).")
    heldout_rows: int | None = Field(
        None,
        ge=1,
        description="Hold out at most this many samples instead of a share, whole prompts and at most half of them; all others "
        "are trained on. Of a named `heldout` source use at most this many.",
    )
    validation_rows: int | None = Field(
        None,
        ge=1,
        description="Set at least this many training samples aside, whole prompts, to watch training by; they are never "
        "trained on, and the final evaluation does not see them.",
    )
    split_seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="Decides which prompts are held out, and which rows a limit keeps."
    )

    @model_validator(mode="after")
    def _template_has_its_place(self) -> DataSettings:
        if self.prompt_template.count("{prompt}") != 1:
            raise ValueError("prompt_template must contain {prompt} exactly once")
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise ValueError("labels need at least two different names")
        if self.learn == "last" and self.train_on_prompt:
            raise ValueError(
                "learn: last contradicts train_on_prompt: true, which learns all of it; remove one of them"
            )
        return self


class RegisterSettings(Section):
    """The MLflow model registry."""

    model: PlainName | None = Field(None, description="Registered model name; default: the recipe's name.")


class SpectraSettings(Section):
    """The singular triplets computed from the base weights, and what dropping them costs."""

    rank: int | None = Field(
        None,
        ge=1,
        description="How many triplets are kept per weight; one artifact serves every smaller rank. Default: what the adapter drops.",
    )
    calibration_tokens: int = Field(
        8192, ge=1, description="How much of the calibration text the rules `loss` and `activation` look at."
    )
    audit_tokens: int = Field(
        2048, ge=1, description="How much held-out text the loss of the truncated base is measured on."
    )
    warn_above: float = Field(
        0.1,
        ge=0,
        description="Warn when truncation costs the base more than this many nats per token, or, with a new `base.head`, "
        "changes more than this share of what the head reads.",
    )


class TrainSettings(Section):
    """The training stage: DeepSpeed ZeRO under Ray Train."""

    workers: int = Field(1, ge=1, description="Training processes (one GPU each when `gpu` is true).")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="While the cluster has no room for `workers`, train with fewer, but at least so many. Default: `workers`.",
    )
    gpu: bool = Field(False, description="Give every training and evaluation worker a GPU.")
    cpus_per_worker: CpuShare = Field(1, description="CPU cores reserved for each training worker.")
    deepspeed: str = Field(
        "cpu_zero2", description="A name in `deepspeed_configs/` or the path of a DeepSpeed JSON file."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Storage and compute type of the base and adapter. `auto` is `bf16` on GPUs and on processors that have "
        "instructions for it, else `fp32`, which is then many times as fast; name one where results must not depend on that.",
    )
    epochs: float = Field(
        1.0, ge=0.001, le=100_000, description="Passes over the training split; `max_steps` cuts it short."
    )
    max_steps: int | None = Field(None, ge=1, description="Upper limit of optimizer steps.")
    batch_size: int = Field(16, ge=1, le=1_000_000, description="Samples per optimizer step over all workers.")
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="Samples per forward pass of one worker. Without dropout it changes no result but by rounding.",
    )
    pack_tokens: int | None = Field(
        None,
        ge=1,
        description="Pack samples end to end, at most this many tokens to a forward pass, instead of padding them; they do "
        "not see each other. `micro_batch_size` has no meaning then.",
    )
    learning_rate: float = Field(
        5e-4,
        gt=0,
        le=LARGEST_RATE,
        description="Peak learning rate of AdamW. The best one falls with the base's width and with alpha ([method](method.md)); "
        "`kasa run --tune lr` finds it.",
    )
    head_learning_rate: float | None = Field(
        None, gt=0, le=LARGEST_RATE, description="Peak learning rate of a new `base.head`; default: `learning_rate`."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay after the warm-up.")
    warmup_share: float = Field(0.06, ge=0, lt=1, description="Share of the steps spent warming up.")
    weight_decay: float = Field(0.0, ge=0, le=LARGEST_RATE, description="AdamW's decoupled weight decay.")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest gradient norm; 0 turns clipping off.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    validate_every: int = Field(
        50,
        ge=1,
        description="With `data.validation_rows`: optimizer steps between measurements of the validation loss. The adapter with "
        "the lowest is kept.",
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many measurements in a row without a lower validation loss."
    )
    start: Literal["scratch", "champion"] = Field(
        "scratch",
        description="`champion`: warm-start from the adapter of the registered champion and keep what that one drops from the base; "
        "from scratch, and said so, where there is none or its base, rank, alpha, targets or truncation differ.",
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seeds the adapter's start, the sample order and dropout.")
    checkpoint_every: int = Field(50, ge=1, description="Optimizer steps between checkpoints.")
    checkpoints_kept: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")
    max_failures: int = Field(3, ge=0, description="Worker crashes survived before the stage fails.")
    collective_timeout_s: float = Field(
        600, ge=1, le=WEEK_S, description="Seconds a worker may wait for another before it gives up."
    )

    @model_validator(mode="after")
    def _fast_precision(self) -> TrainSettings:
        if self.precision == "auto":
            # The settings are frozen, and the value must be set before anyone reads it: a stage's key says what was computed.
            object.__setattr__(self, "precision", fast_precision(self.gpu))
            # A plan for other hardware asks whether the user has chosen a precision.
            self.model_fields_set.discard("precision")
        return self

    @property
    def fewest_workers(self) -> int:
        """The smallest number of training processes that will do."""
        return self.workers if self.min_workers is None else self.min_workers


class HarnessSettings(Section):
    """Tasks of lm-evaluation-harness, beside the held-out samples (the extra `harness`)."""

    tasks: StrList = Field(
        default_factory=list,
        description="Which tasks or groups of tasks, such as `[arc_easy, hellaswag]`. Default: none.",
    )
    include: PathText | None = Field(None, description="A folder with task files of your own.")
    limit: int | None = Field(None, ge=1, description="How many documents of each task. Default: all.")

    @model_validator(mode="after")
    def _has_tasks(self) -> HarnessSettings:
        # Tasks may be taken from a recipe by an override, and the rest stands there.
        if self.model_fields_set and "tasks" not in self.model_fields_set:
            raise ValueError("no task is named; set tasks, such as [arc_easy], or leave the section out")
        return self


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
