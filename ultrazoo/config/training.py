"""The training section: data, optimisation, checkpoints and reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ultrazoo.config.devices import PATTERN, require_device
from ultrazoo.config.paths import PATHS, require_path
from ultrazoo.config.problems import ProblemsError
from ultrazoo.options import Options

SWITCHED = {
    "galore_rank": "use_galore",
    "galore_update_interval": "use_galore",
    "galore_scale": "use_galore",
    "galore_max_dim": "use_galore",
    "gradient_log_interval": "log_gradient_stats",
}
"""Fields that act only when a switch is on."""


class TrainingConfig(Options):
    """One pretraining run: masked language modelling from Parquet."""

    # data
    local_parquet_dir: str | None = Field(None, description="Parquet file, folder or glob; unset: the embedded corpus.")
    text_column: str = Field("text", description="Column that holds the text.")
    on_bad_data: Literal["skip", "error"] = Field(
        "skip",
        description="Rows without text, damaged row groups and files: leave them out and count them, or end the run.",
    )
    tokenizer: str | None = Field(
        None, description="Path of a tokenizer.json; unset: trained from the data, then cached."
    )
    max_length: int = Field(128, ge=8, description="Tokens per row.")
    max_samples: int | None = Field(None, ge=1, le=2**63 - 1, description="Most Parquet rows to use.")
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="Share of tokens to predict.")
    eval_mlm_probability: float = Field(0.15, gt=0, lt=1, description="Share of tokens that validation predicts.")
    whole_word_masking: bool = Field(False, description="Mask whole words.")
    pack_sequences: bool = Field(True, description="Several documents per row, kept apart by segments.")
    shuffle: bool = Field(True, description="Shuffle by seed; false keeps the files' order.")
    dataset_batch_size: int = Field(
        1024, ge=1, description="Parquet rows read and tokenised at once: a shuffle window."
    )
    num_workers: int = Field(2, ge=1, description="Threads that tokenise.")
    dataloader_workers: int = Field(0, ge=0, description="Processes that read, tokenise and pack ahead; 0: none.")
    cache_dir: str | None = Field(None, description="Folder of tokenised shards and trained tokenizers.")
    prefer_local_cache: bool = Field(True, description="Use a complete cache of this very data; false rebuilds it.")
    stream_local_parquet: bool = Field(False, description="Train while reading; false tokenises everything first.")
    validation_fraction: float = Field(0.02, gt=0, lt=0.5, description="Share of rows held out.")

    # steps
    batch_size: int = Field(32, ge=1, description="Rows per micro-batch, of all processes together.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimiser step.")
    exact_balance_loss: bool = Field(
        False,
        description="With accumulation: the balance loss of experts over the whole step, not per micro-batch; costs a "
        "forward pass.",
    )
    num_epochs: float = Field(1.0, gt=0, le=1e9, description="Passes over the data, when neither limit below is set.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps.")
    max_minutes: float | None = Field(None, gt=0, description="Minutes of training; the schedule follows the clock.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of weights, order, masks and dropout.")

    # optimisation
    optimizer: Literal["adamw"] = Field("adamw", description="Optimiser.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["linear", "cosine", "wsd", "constant"] = Field(
        "linear", description="Shape after the warm-up."
    )
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the run spent warming up.")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="Share of the run that wsd spends decaying.")
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1, description="Last learning rate over the peak.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.98, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Epsilon of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled decay of weight matrices.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the total gradient norm to this; 0: no clipping.")
    use_galore: bool = Field(False, description="Optimiser state of linear weights in a low-rank space.")
    galore_rank: int = Field(128, ge=1, description="Rank of that space.")
    galore_update_interval: int = Field(200, ge=1, description="Steps between new projections (1: an SVD every step).")
    galore_scale: float = Field(0.25, gt=0, description="Factor on the projected-back update.")
    galore_max_dim: int = Field(4096, ge=1, description="Weights with a longer side stay on plain AdamW.")

    # machine
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:N or mps.", json_schema_extra={"pattern": f"^{PATTERN}$"}
    )
    num_threads: int | None = Field(None, ge=1, description="Threads of torch on the CPU; unset: torch's choice.")
    kernels: Literal["auto", "compiled", "reference"] = Field("auto", description="Which kernels the ops run on.")
    use_amp: bool = Field(False, description="Mixed precision: bfloat16, or float16 with scaling where it is missing.")
    gradient_checkpointing: bool = Field(
        False, description="Keep only the input of each layer, and run the layer again in the backward pass."
    )
    compile: bool = Field(False, description="Layers through torch.compile; measure before you leave it on.")
    distributed: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="Under torchrun: a replica in each process (auto, ddp) or a shard of every tensor (fsdp).",
    )
    distributed_timeout: int = Field(
        600, ge=10, description="Seconds after which a process that does not answer counts as lost."
    )

    # checkpoints and reports
    output_dir: str | None = Field(None, description="Run folder; unset: runs/<name of the config>.")
    checkpoint_every_n_steps: int = Field(500, ge=1, description="Steps between checkpoints.")
    max_rolling_checkpoints: int = Field(3, ge=0, description="Most recent checkpoints to keep.")
    num_best_checkpoints: int = Field(1, ge=0, description="Best checkpoints to keep, by validation loss.")
    eval_every_n_steps: int = Field(500, ge=1, description="Steps between validations.")
    eval_max_batches: int = Field(50, ge=1, description="Most batches per validation.")
    log_every_n_steps: int = Field(10, ge=1, description="Steps between records in metrics.jsonl.")
    nan_check_interval: int = Field(10, ge=1, description="Steps between checks of loss and gradients for NaN and Inf.")
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="When loss or gradient is not finite: end the run, leave the update out, or return to the last "
        "checkpoint and go on with later data.",
    )
    nan_limit: int = Field(
        5, ge=1, description="Bad steps in a row, or rollbacks without a new checkpoint, that end the run."
    )
    log_gradient_stats: bool = Field(False, description="Record gradient, update and module statistics per block.")
    gradient_log_interval: int = Field(10, ge=1, description="Steps between those records.")
    report_to: tuple[Literal["tensorboard"], ...] = Field((), description="Further trackers.")

    @field_validator(*PATHS)
    @classmethod
    def _no_blank_path(cls, path: str | None, info: ValidationInfo) -> str | None:
        return require_path(str(info.field_name), path)

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        return require_device(name)

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        lines = []
        if self.lr_schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            lines.append(
                f"training.decay_ratio: got {self.decay_ratio} with warmup_ratio {self.warmup_ratio}; "
                "expected a sum of at most 1"
            )
        if self.distributed == "fsdp" and self.use_galore:
            lines.append(
                "training.use_galore: got true with distributed fsdp, whose shards of a gradient have no singular "
                "value decomposition; set distributed to ddp, or use_galore to false"
            )
        if self.compile and self.gradient_checkpointing:
            lines.append(
                "training.compile: got true with gradient_checkpointing, whose layers run twice; expected one of the "
                "two; set the other to false"
            )
        if lines:
            raise ProblemsError(lines)
        return self

    def notices(self) -> list[str]:
        """Values that were set by hand and have no effect on this run, each with the reason."""
        fields = sorted(self.model_fields_set)
        lines = [
            f"training.{name}: has no effect while {SWITCHED[name]} is false"
            for name in fields
            if name in SWITCHED and not getattr(self, SWITCHED[name])
        ]
        if "decay_ratio" in fields and self.lr_schedule != "wsd":
            lines.append("training.decay_ratio: has no effect unless lr_schedule is wsd")
        if "exact_balance_loss" in fields and self.gradient_accumulation_steps == 1:
            lines.append("training.exact_balance_loss: has no effect while gradient_accumulation_steps is 1")
        if "nan_limit" in fields and self.on_nan == "stop":
            lines.append("training.nan_limit: has no effect while on_nan is stop")
        if "num_epochs" in fields and (self.max_steps or self.max_minutes):
            lines.append("training.num_epochs: has no effect, since max_steps or max_minutes is set")
        return lines
