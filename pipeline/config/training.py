"""The `spectra` and `train` sections of a recipe: what is computed of the base weights first, and how the adapter is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.settings import Section
from pipeline.core.machine import fast_precision


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
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores reserved for each training worker.")
    deepspeed: str = Field(
        "cpu_zero2", description="A name in `deepspeed_configs/` or the path of a DeepSpeed JSON file."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Storage and compute type of the base and adapter. `auto` is `bf16` on GPUs and on processors that have "
        "instructions for it, else `fp32`, which is then many times as fast; name one where results must not depend on that.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training split; `max_steps` cuts it short.")
    max_steps: int | None = Field(None, ge=1, description="Upper limit of optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Samples per optimizer step over all workers.")
    micro_batch_size: int = Field(8, ge=1, description="Samples per forward pass of one worker.")
    pack_tokens: int | None = Field(
        None,
        ge=1,
        description="Pack samples end to end, at most this many tokens to a forward pass, instead of padding them; they do "
        "not see each other. `micro_batch_size` has no meaning then.",
    )
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate of AdamW.")
    head_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of a new `base.head`; default: `learning_rate`."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay after the warm-up.")
    warmup_share: float = Field(0.06, ge=0, lt=1, description="Share of the steps spent warming up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
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
    seed: int = Field(0, description="Seeds the adapter's start, the sample order and dropout.")
    checkpoint_every: int = Field(50, ge=1, description="Optimizer steps between checkpoints.")
    checkpoints_kept: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")
    max_failures: int = Field(3, ge=0, description="Worker crashes survived before the stage fails.")
    collective_timeout_s: float = Field(
        600, gt=0, description="Seconds a worker may wait for another before it gives up."
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
