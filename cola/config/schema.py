"""Every setting of a run as typed dataclasses; the YAML files in `conf/` hold the values.

No Hydra here: workers and library users may import this module. `ExperimentConfig` is the root.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cola.config.choices import (
    AdapterDType,
    AdapterKind,
    ClipMode,
    DType,
    EvaluationMerge,
    Family,
    LateUser,
    MergeMode,
    MethodName,
    ModelSource,
    Objective,
    OffloadTarget,
    OptimizerName,
    OtherUsers,
    Padding,
    Payload,
    Pristine,
    Reduction,
    Rounding,
    RowLengths,
    ScheduleName,
    SelectOn,
    TrackingName,
    UserGradient,
    UserLoss,
    UsersMode,
    WireDType,
)


@dataclass(kw_only=True)
class ModelConfig:
    """The frozen base model."""

    name: str = MISSING
    source: ModelSource = MISSING
    family: Family | None = None  # None: follow the task
    path: str | None = None  # hub id or local folder
    sites: list[str] | None = None  # qv, all, parts or patterns of module names; None: qv
    dtype: DType = DType.float32
    autocast: bool = False  # matrix products in bfloat16, parameters in `dtype`
    tf32: bool = False  # float32 matrix products of a GPU rounded to TF32
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False  # blocks are replayed, for batches of a shape that comes again
    architecture: dict[str, Any] = field(default_factory=dict)  # full configuration for dry runs


@dataclass(kw_only=True)
class TaskConfig:
    """The data set, how it is encoded, and what is scored."""

    name: str = MISSING
    folder: str | None = None  # folder of the set below data_dir
    hub: str | None = None  # data set id on the Hugging Face hub
    revision: str | None = None  # branch or commit of the hub's set
    subset: str | None = None
    objective: Objective | None = None  # None: posed by the model's family
    num_labels: int = MISSING
    image_shape: list[int] | None = None  # channels, height, width
    max_length: int = 128  # tokens
    padding: Padding = Padding.dynamic
    max_train_rows: int | None = None  # first rows of train
    max_eval_rows: int | None = None  # first rows of every split that is scored
    train_file: str | None = None  # one's own files (task=jsonl) from here on
    validation_file: str | None = None
    test_file: str | None = None
    template: str | None = None  # "...{column}..."
    target: str | None = None  # column of the label or response
    user: str | None = None  # column that names a row's user
    labels: list[str] | None = None  # classes in order; None: those of the train file, sorted


@dataclass(kw_only=True)
class AdapterConfig:
    """The adapter of every site but new heads, which always get a linear one with bias."""

    kind: AdapterKind = MISSING
    rank: int = 8
    hidden: list[int] = field(default_factory=lambda: [128, 256])  # widths of the MLP
    alpha: float = 1.0  # scale of the adapter's output, not divided by the rank
    init: str | None = None  # a run's folder, its adapters folder or a PEFT folder to start from


@dataclass(kw_only=True)
class MergeConfig:
    """Whether linear adapters are folded into the base model while training."""

    mode: MergeMode = MISSING
    pristine: Pristine = Pristine.host
    rounding: Rounding = Rounding.nearest


@dataclass(kw_only=True)
class MethodConfig:
    """How parameters are trained; everything but the name is for baselines."""

    name: MethodName = MISSING
    sites: list[str] | None = None  # targets of AdaLoRA and IA3; None: the PEFT library's
    activation_offload: bool = False  # tensors saved for the backward pass wait on the CPU
    adapter_dtype: AdapterDType = AdapterDType.float32  # LoRA
    init_rank: int = 64  # AdaLoRA: ranks per site before the budget shrinks
    target_rank: int = 8  # AdaLoRA: mean ranks per site at the end
    beta: float = 0.85  # AdaLoRA: smoothing of importance and of its uncertainty
    delta_t: int = 10  # AdaLoRA: adaptations between two reallocations
    init_ratio: float = 0.1  # AdaLoRA: share of the run at the full budget
    final_ratio: float = 0.3  # AdaLoRA: share of the run at the final budget
    orth_weight: float = 0.5  # AdaLoRA: weight of the orthogonality penalty
    virtual_tokens: int = 20  # prompt, prefix and p-tuning
    init_text: str = "Label: "  # prompt tuning starts from the embedding of this text
    encoder_hidden: int = 128  # p-tuning: width of the prompt encoder


@dataclass(kw_only=True)
class UserAdapterConfig:
    """What one user has otherwise than the run; null is as the run has it."""

    user: str = MISSING
    kind: AdapterKind | None = None
    rank: int | None = None
    hidden: list[int] | None = None
    alpha: float | None = None
    lr: float | None = None
    optimizer: OptimizerName | None = None


@dataclass(kw_only=True)
class UserVisitConfig:
    """When a user takes part, and what its adapters start from."""

    user: str = MISSING
    join: int = 1  # first step with the user's rows
    leave: int | None = None  # first step without them; None: stays
    init: str | None = None  # folder of adapters that left a run; None: fresh ones


@dataclass(kw_only=True)
class UsersConfig:
    """Who owns data and adapters."""

    name: UsersMode = MISSING
    num: int | None = None  # K; None: as many as the data or `names` has
    column: str | None = None  # column that names a row's user; None: the set's own, else shards
    names: list[str] | None = None  # in order; None: the set's own order, else the largest first
    others: OtherUsers = OtherUsers.refuse
    kinds: list[str] | None = None  # adapter kinds of equal parts of the users, in order
    adapters: list[UserAdapterConfig] = field(default_factory=list)
    gradient: UserGradient = UserGradient.federated
    reduce: Reduction = Reduction.mean  # of the users' delta weights in a merge
    loss: UserLoss = UserLoss.batch
    schedule: list[UserVisitConfig] = field(default_factory=list)
    local: list[str] = field(default_factory=list)  # users who fit in processes of their own
    local_dir: str | None = None  # where data is handed over; None: `local` in the run's folder
    local_seconds: float = 60.0  # how long an adaptation waits for them
    local_late: LateUser = LateUser.wait


@dataclass(kw_only=True)
class OffloadConfig:
    """Where adapters are fitted and their optimizer states live."""

    name: OffloadTarget = MISSING
    device: list[str] | None = None  # GPUs (cuda:i) that fit; None: the first beside the base's
    workers: int | None = None  # threads; None: by the machine's cores
    payload: Payload = Payload.factors
    base_gradients: bool = False  # payload=auto may form low-rank gradients on the base device
    staleness: int = 0  # adaptations that the base model may lag behind its adapters; 0 is exact
    drop_padding: bool = True  # rows of padding stay where they are: their gradient is zero
    wire_dtype: WireDType = WireDType.base


@dataclass(kw_only=True)
class TrackingConfig:
    """Where metrics go besides the run's own files."""

    name: TrackingName = MISSING
    project: str = "cola"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class OptimizerConfig:
    """One optimizer for every method; `lr` and `clip` default by `config/defaults.py`."""

    name: OptimizerName = OptimizerName.adamw
    lr: float | None = None
    head_lr: float | None = None  # of new heads; None: lr, or the table's if lr is null, too
    weight_decay: float = 5e-4
    momentum: float = 0.9  # SGD only
    nesterov: bool = True  # SGD only
    clip: ClipMode | None = None
    clip_norm: float = 1.0


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over adaptations (not batches)."""

    name: ScheduleName = ScheduleName.linear
    warmup_ratio: float = 0.05


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop. A step is one batch."""

    epochs: int = 40
    max_steps: int | None = None  # wins over epochs
    batch_size: int = 32
    interval: int = 1  # batches per adaptation (I)
    interval_reduction: Reduction = Reduction.mean
    log_every: int = 10  # steps
    eval_every: int | None = None  # steps; None: every epoch


@dataclass(kw_only=True)
class EvaluationConfig:
    """How and on what the model is scored."""

    merge: EvaluationMerge = EvaluationMerge.auto
    select_on: SelectOn = SelectOn.validation
    batch_size: int = 128
    num_samples: int = 8  # predictions kept of every evaluation, to be read


@dataclass(kw_only=True)
class GenerationConfig:
    """Decoding of generated text; null is the paper's setting for the kind of model."""

    max_new_tokens: int | None = None  # 40 for decoders, task.max_length for encoder-decoders
    num_beams: int | None = None  # 1 (greedy); 4
    no_repeat_ngram: int | None = None  # 2; 3. 0 allows repetition
    batch_size: int = 32  # prompts at a time, each times num_beams


@dataclass(kw_only=True)
class CheckpointConfig:
    """State saved while running."""

    every: int | None = None  # steps; None: at every evaluation
    keep: int = 2  # newest checkpoints kept


@dataclass(kw_only=True)
class BenchConfig:
    """What `cola-bench` measures; no other command reads it."""

    table: int | None = None  # of the paper: 10 to 18
    models: list[str] = field(default_factory=list)  # one after another; empty: model=NAME alone
    rows: list[str] = field(default_factory=lambda: ["*"])  # patterns of names; --dry lists them
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8, 32]
    )  # rows, of all users together
    offload: list[OffloadTarget] = field(default_factory=lambda: list(OffloadTarget))
    lengths: RowLengths = RowLengths.full
    warmup: int = 3  # iterations that are not measured
    iterations: int = 10  # 3 where one takes over 5 s
    redo: bool = False  # measures rows anew that the folder has already


@dataclass(kw_only=True)
class ExperimentConfig:
    """Everything that decides a run's numbers, and where it writes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    users: UsersConfig = field(default_factory=UsersConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    seed: int = 0
    split_seed: int = 0  # splits are seeded apart, so that seeds share a split
    device: str = "auto"  # the base model's: auto, cpu or cuda:i
    data_dir: str | None = None  # local data instead of the hub
    experiment_name: str | None = None  # set by conf/experiment; names the output folder
    dry_run: bool = False
    resume: str | None = None  # a run folder, auto or once
