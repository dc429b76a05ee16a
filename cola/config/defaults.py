"""Default learning rate and clipping by method, adapter, task and model.

A table, because both were found by measurement and no formula gives them. `null` in the YAML means
"look here"; a value there or on the command line wins.
"""

import dataclasses
import fnmatch
from dataclasses import dataclass

from cola.config.choices import AdapterKind, ClipMode, MethodName, ModelSource
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; a field left out matches everything.

    Attributes:
        value: the default.
        method, adapter: who is trained; an adapter matches method=cola only.
        task: `name` or `name/subset`, a pattern.
        model: name of the model, a pattern.
        source: where the base model comes from.
    """

    value: float
    method: MethodName | None = None
    adapter: AdapterKind | None = None
    task: str = "*"
    model: str = "*"
    source: ModelSource | None = None

    def matches(self, config: ExperimentConfig) -> bool:
        """Whether every field that is set agrees with the configuration."""
        is_cola = config.method.name is MethodName.cola
        task = "/".join(part for part in (config.task.name, config.task.subset) if part)
        return (
            self.method in (None, config.method.name)
            and (self.adapter is None or (is_cola and self.adapter is config.adapter.kind))
            and fnmatch.fnmatchcase(task, self.task)
            and fnmatch.fnmatchcase(config.model.name, self.model)
            and self.source in (None, config.model.source)
        )


_FT, _COLA = MethodName.ft, MethodName.cola
_LINEAR, _MLP = AdapterKind.linear, AdapterKind.mlp
_VIRTUAL_TOKENS = (MethodName.prompt, MethodName.prefix, MethodName.ptuning)
_OTHER_PEFT = (MethodName.adalora, MethodName.ia3, *_VIRTUAL_TOKENS)

# The first row that matches counts: most specific first, the paper's general values last.
LEARNING_RATES: tuple[Row, ...] = (
    # Images, every method: the reference implementation's SGD rate (hyperparameters.csv, image).
    Row(value=3e-2, source=ModelSource.image),
    # Tiny random bases: of 3e-3 to 3e-1 in thirds of a decade, the rate with which each of these
    # learns the synthetic task on tiny-roberta and on tiny-gpt2. Our choice, not a published value.
    *(Row(value=3e-2, model="tiny-*", method=method) for method in _OTHER_PEFT),
    # Tiny random bases learn only through their adapters and need large steps: our choice, for
    # tests and demonstrations, not a published value.
    Row(value=3e-3, model="tiny-*"),
    # Small encoders by `model=hf`, measured with MiniLM on MRPC (docs/results/mrpc.json). LoRA and
    # low-rank stay at the majority class with the paper's 3e-4 and learn with 3e-3; linear has no
    # bottleneck and takes a tenth of it; FT is the usual rate for BERT-like encoders. AdamW moves
    # every weight by about its rate, and the hundreds of ReLU units before an MLP's last layer move
    # its output the same way: at 3e-3 it grows to twenty times h, at 3e-4 it learns.
    Row(value=5e-5, model="hf", method=_FT),
    Row(value=3e-4, model="hf", adapter=_LINEAR),
    Row(value=3e-4, model="hf", adapter=_MLP),
    # Virtual tokens are few and far from the loss; their papers take a hundredth and more. Our
    # choice, not measured.
    *(Row(value=1e-2, model="hf", method=method) for method in _VIRTUAL_TOKENS),
    Row(value=3e-3, model="hf"),
    # Paper, section C.1: linear adapters on the five larger or harder GLUE sets.
    Row(value=5e-6, model="roberta-base", adapter=_LINEAR, task="glue/mnli"),
    Row(value=5e-6, model="roberta-base", adapter=_LINEAR, task="glue/sst2"),
    Row(value=5e-6, model="roberta-base", adapter=_LINEAR, task="glue/qnli"),
    Row(value=5e-6, model="roberta-base", adapter=_LINEAR, task="glue/qqp"),
    Row(value=5e-6, model="roberta-base", adapter=_LINEAR, task="glue/rte"),
    # Paper, section C.1: linear adapters of Llama-2 on Dolly.
    Row(value=5e-6, model="llama-2-7b", adapter=_LINEAR, task="dolly"),
    # Paper, Table 5: full fine-tuning of text models.
    Row(value=5e-6, method=_FT),
    # Paper, Table 5: PEFT methods and ColA on text models.
    Row(value=3e-4),
)

# Rate of new heads where it is not that of the adapters; only if `optimizer.lr` is a default, too.
HEAD_LEARNING_RATES: tuple[Row, ...] = (
    # The rate of LoRA's head; with 3e-4 for both, three epochs are too few to leave the majority.
    Row(value=3e-3, model="hf", adapter=_MLP),
)


def _default_head_lr(config: ExperimentConfig) -> float | None:
    return next((row.value for row in HEAD_LEARNING_RATES if row.matches(config)), None)


def _default_lr(config: ExperimentConfig) -> float:
    for row in LEARNING_RATES:
        if row.matches(config):
            return row.value
    # Unreachable while the table ends in a row that matches everything; a changed table says so.
    raise ConfigError("optimizer.lr: no default for this method, task and model; set it")


def _default_clip(config: ExperimentConfig) -> ClipMode:
    # Reference implementation (hyperparameters.csv): text is not clipped; images are clipped to
    # norm 1, over all parameters for FT and LoRA, adapter by adapter for ColA.
    if config.model.source is not ModelSource.image:
        return ClipMode["none"]
    return ClipMode["adapter"] if config.method.name is _COLA else ClipMode["global"]


def resolve_defaults(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with rates and `optimizer.clip` filled in where they are null.

    Args:
        config: composed and valid; not changed.

    Returns:
        A copy; an already resolved configuration comes back equal.
    """
    optimizer = config.optimizer
    if optimizer.lr is None and optimizer.head_lr is None:
        optimizer = dataclasses.replace(optimizer, head_lr=_default_head_lr(config))
    optimizer = dataclasses.replace(
        optimizer,
        lr=_default_lr(config) if optimizer.lr is None else optimizer.lr,
        clip=_default_clip(config) if optimizer.clip is None else optimizer.clip,
    )
    return dataclasses.replace(config, optimizer=optimizer)
