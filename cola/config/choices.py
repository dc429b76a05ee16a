"""The choices of every setting that has a fixed list of them.

Member *names* are what a user writes, hence lower case. No imports: `--help` and workers load this.
"""

from enum import Enum


class AdapterKind(Enum):
    """Structure of an adapter g_w."""

    lowrank = "lowrank"
    linear = "linear"
    mlp = "mlp"


class MergeMode(Enum):
    """Where the adapter acts during training."""

    unmerged = "unmerged"
    merged = "merged"
    detached = "detached"


class Pristine(Enum):
    """Which memory keeps the unmerged weights of merged sites."""

    host = "host"
    base = "base"


class Rounding(Enum):
    """How a merged weight is rounded to the base model's dtype."""

    nearest = "nearest"
    stochastic = "stochastic"


class MethodName(Enum):
    """Training method: gradient learning, or a baseline by plain back-propagation."""

    cola = "cola"
    ft = "ft"
    lora = "lora"
    adalora = "adalora"
    ia3 = "ia3"
    prompt = "prompt"
    prefix = "prefix"
    ptuning = "ptuning"


class OffloadTarget(Enum):
    """Where adapters are fitted."""

    none = "none"  # on the base model's device
    cpu = "cpu"
    gpu = "gpu"  # on another one


class Payload(Enum):
    """What of a site leaves the base device."""

    factors = "factors"  # hidden input and hidden gradient, the paper's
    gradient = "gradient"  # the parameters' gradient, formed on the base device
    auto = "auto"  # whichever was measured to be faster, site by site


class WireDType(Enum):
    """Floating-point type in which adaptation data travels."""

    base = "base"  # the base model's
    bfloat16 = "bfloat16"


class AdapterDType(Enum):
    """Floating-point type of LoRA's parameters, which decides what multiplies them."""

    float32 = "float32"  # as the PEFT library makes them, whatever the base model's; never narrower
    base = "base"  # the base model's


class RowLengths(Enum):
    """Tokens of the rows that `cola-bench` makes up; a row is cut to `task.max_length`."""

    full = "full"  # all of task.max_length
    cola = "cola"  # as the sentences of GLUE's CoLA
    dolly = "dolly"  # as the instructions and responses of Dolly


class UsersMode(Enum):
    """Who owns data and adapters; the paper's Section 3.3 and Table 4."""

    one = "one"  # K = 1
    joint = "joint"  # data of K users, one set of adapters
    alone = "alone"  # a set for every user, who sees and teaches nothing but their own
    collaboration = "collaboration"  # a set for every user, all merged into one model

    @property
    def owns_adapters(self) -> bool:
        """Whether every user has adapters of their own."""
        return self in (UsersMode.alone, UsersMode.collaboration)


class UserGradient(Enum):
    """What teaches a user's adapters in collaboration."""

    federated = "federated"  # the user's own rows, as the paper does
    exact = "exact"  # all rows: the gradient of the merged objective


class UserLoss(Enum):
    """What a user's rows are averaged over."""

    batch = "batch"  # all rows of the batch, as the paper does
    per_user = "per_user"  # the user's own rows, as if each trained apart


class OtherUsers(Enum):
    """What happens to rows of users that the run does not have."""

    refuse = "refuse"
    drop = "drop"


class LateUser(Enum):
    """What becomes of a user whose own process has not answered in time."""

    wait = "wait"  # takes no part until the answer comes
    drop = "drop"  # leaves


class TrackingName(Enum):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb = "wandb"
    files = "files"


class OptimizerName(Enum):
    """Optimizer of every trainable parameter."""

    sgd = "sgd"
    adamw = "adamw"


# `global` is a Python keyword, so this enum is written in the functional form.
ClipMode = Enum("ClipMode", {"none": "none", "adapter": "adapter", "global": "global"})


class ScheduleName(Enum):
    """Shape of the learning rate over adaptations."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Reduction(Enum):
    """How the batches of one interval, or the users of one merge, combine."""

    mean = "mean"
    sum = "sum"


class DType(Enum):
    """Floating-point type of the base model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class ModelSource(Enum):
    """Where the base model's parameters come from."""

    pretrained = "pretrained"  # a Hugging Face id or folder, in `path`
    random = "random"  # a Hugging Face architecture with seeded random weights
    image = "image"  # this package's small image models, seeded random weights


class Family(Enum):
    """What a text model is built for; decides how a free-form task is posed."""

    encoder = "encoder"
    decoder = "decoder"
    seq2seq = "seq2seq"


class Objective(Enum):
    """What the task loss scores."""

    classification = "classification"
    regression = "regression"
    causal = "causal"
    seq2seq = "seq2seq"
    image = "image"  # classification of images

    @property
    def writes(self) -> bool:
        """Whether the model answers with text, which is generated when it is evaluated."""
        return self in (Objective.causal, Objective.seq2seq)


class Padding(Enum):
    """Length of a padded text batch."""

    dynamic = "dynamic"  # to the longest row of the batch
    max_length = "max_length"  # to task.max_length, as the paper does


class EvaluationMerge(Enum):
    """Whether evaluation folds adapters into the base model."""

    auto = "auto"  # as training did
    merged = "merged"
    unmerged = "unmerged"
    both = "both"  # while training as `auto`; the final report has both

    @property
    def merges(self) -> bool:
        """Whether it merges adapters, whatever training did."""
        return self in (EvaluationMerge.merged, EvaluationMerge.both)


class SelectOn(Enum):
    """Split that chooses the best evaluation of a run."""

    validation = "validation"
    test = "test"  # the paper's protocol
