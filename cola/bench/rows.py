"""Which rows a computation table has: pure data, from one configuration. Paper: Tables 10 to 18.

Every row is a configuration of its own: method x adapter x merge x offload x batch size, and where
users have adapters of their own, kinds of the users' parts. Rows that the paper does not have stand
beside its own: the floor (the frozen base model and hidden gradients, with nothing captured), which
no method can go below, LoRA in the forms in which it is used, and gradient checkpointing. No torch.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence

from cola.bench.row import FLOOR, BenchRow
from cola.config.choices import (
    AdapterDType,
    AdapterKind,
    DType,
    MergeMode,
    MethodName,
    ModelSource,
    OffloadTarget,
    UsersMode,
)
from cola.config.defaults import resolve_defaults
from cola.config.keys import flatten, nearest_words, word
from cola.config.schema import (
    BenchConfig,
    ExperimentConfig,
    MergeConfig,
    OffloadConfig,
    UsersConfig,
)
from cola.errors import ConfigError

_COLA = (
    (AdapterKind.lowrank, MergeMode.unmerged),
    (AdapterKind.lowrank, MergeMode.merged),
    (AdapterKind.linear, MergeMode.unmerged),
    (AdapterKind.linear, MergeMode.merged),
    (AdapterKind.mlp, MergeMode.unmerged),
)
_USER_KINDS = (
    ("lowrank", MergeMode.unmerged),
    ("lowrank", MergeMode.merged),
    ("lowrank-linear", MergeMode.unmerged),
    ("lowrank-linear", MergeMode.merged),
    ("lowrank-mlp", MergeMode.unmerged),
)
_OTHER_PEFT = (
    MethodName.adalora,
    MethodName.ia3,
    MethodName.prompt,
    MethodName.prefix,
    MethodName.ptuning,
)
_CHECKPOINTING = "-checkpointing"
_GRAPHS = "-graphs"


def with_random_weights(config: ExperimentConfig, given: Collection[str]) -> ExperimentConfig:
    """Random weights of the true shape, unless somebody says where there are real ones.

    Args:
        config: of a table or of a single row.
        given: keys that were set explicitly.
    """
    model = config.model
    if model.source is not ModelSource.pretrained or "model.path" in given:
        return config
    if not model.architecture:  # model=hf: validation asks for a path
        return config
    model = dataclasses.replace(model, source=ModelSource.random, path=None)
    return dataclasses.replace(config, model=model)


def select_rows(configs: Sequence[ExperimentConfig]) -> list[BenchRow]:
    """Rows of one configuration per model, those that `bench.rows` asks for.

    Raises:
        ConfigError: a pattern matches no row.
    """
    rows = [row for config in configs for row in build_rows(config, has_others=len(configs) > 1)]
    patterns = configs[0].bench.rows
    for pattern in patterns:
        if not any(_matches(row, pattern) for row in rows):
            labels = list(dict.fromkeys(row.label for row in rows))
            raise ConfigError(
                f"bench.rows: no row is called '{pattern}'; {nearest_words(pattern, labels)}"
                f"rows: {', '.join(labels)}, each with /b and a batch size; patterns such as "
                "cola-*-cpu/b8 name several"
            )
    return [row for row in rows if any(_matches(row, pattern) for pattern in patterns)]


def build_rows(config: ExperimentConfig, *, has_others: bool = False) -> Iterator[BenchRow]:
    """All rows of a configuration, those of one batch size together.

    Args:
        config: of the table; what rows differ in is replaced.
        has_others: names tell which model a row has.
    """
    prefix = f"{config.model.name}/" if has_others else ""
    for size in config.bench.batch_sizes:
        trainer = dataclasses.replace(config.trainer, batch_size=size)
        sized = dataclasses.replace(config, trainer=trainer)
        for label, row in _variants(sized):
            yield BenchRow(
                name=f"{prefix}{label}/b{size}",
                label=label,
                config=resolve_defaults(row),
                overrides=_differences(config, row),
                is_floor=label.startswith(FLOOR),
            )


def _variants(config: ExperimentConfig) -> Iterator[tuple[str, ExperimentConfig]]:
    """Label and configuration of every row of one batch size."""
    plain = _plain(config)
    has_text = config.model.source is not ModelSource.image
    has_users = config.users.name.owns_adapters
    yield FLOOR, plain
    if has_text:
        yield FLOOR + _CHECKPOINTING, _checkpointing(plain)
    if not has_users:
        yield from _ft_variants(plain)
    yield from _lora_variants(plain, has_text=has_text)
    if has_text and not has_users:
        for method in _OTHER_PEFT:
            yield method.name, _method(plain, method)
    targets = list(dict.fromkeys(config.bench.offload))
    build: Callable[..., tuple[str, ExperimentConfig]] = _for_users if has_users else _for_one
    choices: Sequence[tuple[object, MergeMode]] = _USER_KINDS if has_users else _COLA
    for adapter, merge in choices:
        for target in targets:
            yield build(config, plain, adapter, merge, target)
    for adapter, merge in choices[:2] if has_text else ():  # low-rank, in both modes
        for target in targets:
            label, row = build(config, plain, adapter, merge, target)
            if target is not OffloadTarget.none:
                yield label + _CHECKPOINTING, _checkpointing(row)
    if config.device == "cpu":  # graphs are a GPU's
        return
    for adapter, merge in choices:
        for target in targets:
            label, row = build(config, plain, adapter, merge, target)
            if not (has_users and merge is MergeMode.unmerged):
                yield label + _GRAPHS, _graphs(row)


def _plain(config: ExperimentConfig) -> ExperimentConfig:
    """One user, nothing merged or offloaded, no setting of the benchmark itself."""
    return dataclasses.replace(
        config,
        bench=BenchConfig(),
        merge=MergeConfig(mode=MergeMode.unmerged),
        offload=OffloadConfig(name=OffloadTarget.none, drop_padding=config.offload.drop_padding),
        users=UsersConfig(name=UsersMode.one),
    )


def _ft_variants(plain: ExperimentConfig) -> Iterator[tuple[str, ExperimentConfig]]:
    """As the paper measures it and, if that is in bfloat16, with parameters and states in float32.

    The linear adapters that are compared with it are stepped in float32, and AdamW in bfloat16
    loses most of its steps to rounding.
    """
    yield "ft", _method(plain, MethodName.ft)
    if plain.model.dtype is DType.bfloat16:
        model = dataclasses.replace(plain.model, dtype=DType.float32, autocast=True)
        yield "ft-autocast", _method(dataclasses.replace(plain, model=model), MethodName.ft)


def _lora_variants(
    plain: ExperimentConfig, *, has_text: bool
) -> Iterator[tuple[str, ExperimentConfig]]:
    lora = _method(plain, MethodName.lora)
    yield "lora", lora
    if lora.model.dtype is DType.bfloat16:
        method = dataclasses.replace(lora.method, adapter_dtype=AdapterDType.base)
        yield "lora-bfloat16", dataclasses.replace(lora, method=method)
    if not has_text:
        return
    yield "lora" + _CHECKPOINTING, _checkpointing(lora)
    method = dataclasses.replace(lora.method, activation_offload=True)
    yield "lora-activation-offload", dataclasses.replace(lora, method=method)
    if lora.model.sites != ["all"]:
        yield (
            "lora-all",
            dataclasses.replace(lora, model=dataclasses.replace(lora.model, sites=["all"])),
        )


def _for_one(
    config: ExperimentConfig,
    plain: ExperimentConfig,
    kind: AdapterKind,
    merge: MergeMode,
    target: OffloadTarget,
) -> tuple[str, ExperimentConfig]:
    adapter = dataclasses.replace(config.adapter, kind=kind)
    row = _placed(config, dataclasses.replace(plain, adapter=adapter), merge, target)
    return f"cola-{kind.name}-{merge.name}-{target.name}", row


def _for_users(
    config: ExperimentConfig,
    plain: ExperimentConfig,
    kinds: str,
    merge: MergeMode,
    target: OffloadTarget,
) -> tuple[str, ExperimentConfig]:
    merged = merge is MergeMode.merged
    users = dataclasses.replace(
        config.users,
        name=UsersMode.collaboration if merged else UsersMode.alone,
        kinds=[kinds] if "-" in kinds else None,
    )
    row = _placed(config, dataclasses.replace(plain, users=users), merge, target)
    return f"cola-{kinds}-{merge.name}-{target.name}", row


def _placed(
    config: ExperimentConfig, row: ExperimentConfig, merge: MergeMode, target: OffloadTarget
) -> ExperimentConfig:
    """Merged and offloaded as asked, with what the table sets about either."""
    method = dataclasses.replace(row.method, name=MethodName.cola)
    row = dataclasses.replace(row, method=method)
    if merge is MergeMode.merged:
        row = dataclasses.replace(row, merge=dataclasses.replace(config.merge, mode=merge))
    if target is not OffloadTarget.none:
        # A list of GPUs is for the rows that fit on one.
        gpus = config.offload.device if target is OffloadTarget.gpu else None
        offload = dataclasses.replace(config.offload, name=target, device=gpus)
        row = dataclasses.replace(row, offload=offload)
    return row


def _method(config: ExperimentConfig, name: MethodName) -> ExperimentConfig:
    return dataclasses.replace(config, method=dataclasses.replace(config.method, name=name))


def _checkpointing(config: ExperimentConfig) -> ExperimentConfig:
    model = dataclasses.replace(config.model, gradient_checkpointing=True)
    return dataclasses.replace(config, model=model)


def _graphs(config: ExperimentConfig) -> ExperimentConfig:
    model = dataclasses.replace(config.model, cuda_graphs=True)
    return dataclasses.replace(config, model=model)


def _differences(table: ExperimentConfig, row: ExperimentConfig) -> tuple[str, ...]:
    before, after = flatten(table), flatten(row)
    return tuple(
        f"{key}={word(value)}"
        for key, value in after.items()
        if value != before[key] and not key.startswith("bench.")
    )


def _matches(row: BenchRow, pattern: str) -> bool:
    short = f"{row.label}/b{row.batch_size}"  # without the model
    names = (row.name, row.name.rpartition("/")[0], row.label, short)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
