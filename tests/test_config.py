"""Composition of configurations, and overrides that cannot be meant."""

from pathlib import Path

import pytest

from cola.config.choices import AdapterKind, ClipMode, MergeMode, TrackingName
from cola.config.groups import conf_dir, describe_choice, group_choices
from cola.config.keys import flatten, nearest, schema_keys
from cola.config.store import compose_config, compose_run
from cola.errors import ConfigError
from cola.synthetic_language import CATEGORY_OPENINGS
from tests.configs import composed

KEYS = [
    "model.name",
    "model.source",
    "model.family",
    "model.path",
    "model.sites",
    "model.dtype",
    "model.autocast",
    "model.tf32",
    "model.gradient_checkpointing",
    "model.cuda_graphs",
    "model.architecture",
    "task.name",
    "task.folder",
    "task.hub",
    "task.revision",
    "task.subset",
    "task.objective",
    "task.num_labels",
    "task.image_shape",
    "task.max_length",
    "task.padding",
    "task.max_train_rows",
    "task.max_eval_rows",
    "task.train_file",
    "task.validation_file",
    "task.test_file",
    "task.template",
    "task.target",
    "task.user",
    "task.labels",
    "adapter.kind",
    "adapter.rank",
    "adapter.hidden",
    "adapter.alpha",
    "adapter.init",
    "merge.mode",
    "merge.pristine",
    "merge.rounding",
    "method.name",
    "method.sites",
    "method.activation_offload",
    "method.adapter_dtype",
    "method.init_rank",
    "method.target_rank",
    "method.beta",
    "method.delta_t",
    "method.init_ratio",
    "method.final_ratio",
    "method.orth_weight",
    "method.virtual_tokens",
    "method.init_text",
    "method.encoder_hidden",
    "users.name",
    "users.num",
    "users.column",
    "users.names",
    "users.others",
    "users.kinds",
    "users.adapters",
    "users.gradient",
    "users.reduce",
    "users.loss",
    "users.schedule",
    "users.local",
    "users.local_dir",
    "users.local_seconds",
    "users.local_late",
    "offload.name",
    "offload.device",
    "offload.workers",
    "offload.payload",
    "offload.base_gradients",
    "offload.staleness",
    "offload.drop_padding",
    "offload.wire_dtype",
    "tracking.name",
    "tracking.project",
    "tracking.entity",
    "tracking.tags",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.head_lr",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.nesterov",
    "optimizer.clip",
    "optimizer.clip_norm",
    "schedule.name",
    "schedule.warmup_ratio",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.interval",
    "trainer.interval_reduction",
    "trainer.log_every",
    "trainer.eval_every",
    "evaluation.merge",
    "evaluation.select_on",
    "evaluation.batch_size",
    "evaluation.num_samples",
    "generation.max_new_tokens",
    "generation.num_beams",
    "generation.no_repeat_ngram",
    "generation.batch_size",
    "checkpoint.every",
    "checkpoint.keep",
    "bench.table",
    "bench.models",
    "bench.rows",
    "bench.batch_sizes",
    "bench.offload",
    "bench.lengths",
    "bench.warmup",
    "bench.iterations",
    "bench.redo",
    "seed",
    "split_seed",
    "device",
    "data_dir",
    "experiment_name",
    "dry_run",
    "resume",
]

# What a choice needs besides itself.
COMPANIONS = {
    ("model", "hf"): ["task=glue", "model.path=somewhere"],
    ("model", "roberta-base"): ["task=glue"],
    ("model", "tiny-roberta"): ["task=synthetic"],
    ("model", "bart-base"): ["task=synthetic"],
    ("model", "gpt2"): ["task=synthetic"],
    ("model", "llama-2-7b"): ["task=synthetic"],
    ("model", "tiny-bart"): ["task=synthetic"],
    ("model", "tiny-gpt2"): ["task=synthetic"],
    ("model", "tiny-llama"): ["task=synthetic"],
    **{
        ("method", name): ["task=synthetic"]
        for name in ("adalora", "ia3", "prompt", "prefix", "ptuning")
    },
    # A dry run looks for no files.
    ("task", "jsonl"): ["task.train_file=a.jsonl", "task.target=answer", "dry_run=true"],
}


def every_choice() -> list[tuple[str, str]]:
    """All but rows of tables and figures, whose values have a test of their own."""
    """All but the experiments of rows; those of one kind with many choices are slow tests."""
    return [
        pytest.param(group, choice, marks=[pytest.mark.slow] if group in ("model", "task") else [])
        for group, choices in group_choices().items()
        for choice in choices
        if not choice.startswith(("table", "figure"))
    ]


def test_schema_keys_are_pinned():
    # Scripts of other people depend on these names: a change belongs into the changelog.
    assert list(schema_keys()) == KEYS


@pytest.mark.parametrize(("group", "choice"), every_choice())
def test_every_choice_composes_and_says_what_it_is(group, choice):
    composed(*COMPANIONS.get((group, choice), []), f"{group}={choice}")
    assert len(describe_choice(group, choice)) > 10


def test_task_chooses_its_model_and_the_command_line_wins():
    assert compose_config(["task=glue"]).model.name == "roberta-base"
    assert compose_config(["model=tiny-roberta", "task=glue"]).model.name == "tiny-roberta"


def test_experiment_overrides_task_and_yields_to_the_command_line():
    config = composed("experiment=smoke").config
    assert (config.trainer.max_steps, config.tracking.name) == (2, TrackingName.files)
    config = compose_config(["experiment=smoke", "trainer.max_steps=5", "tracking=wandb"])
    assert (config.trainer.max_steps, config.tracking.name) == (5, TrackingName.wandb)


ROWS = [name for name in group_choices()["experiment"] if name.startswith(("table4_", "table8_"))]


def test_rows_of_the_tables_of_users_are_complete():
    joint = [f"joint_{row}" for row in ("lowrank_unmerged", "lowrank_merged", "linear_unmerged",
             "linear_merged", "mlp_unmerged")]  # fmt: skip
    common = [*joint, "alone_lowrank", "alone_lowrank_mlp", "collaboration_lowrank"]
    mixed = ["alone_lowrank_linear", "collaboration_lowrank_linear"]
    rows = {4: [*common, *mixed], 8: common}
    assert sorted(ROWS) == sorted(f"table{n}_{row}" for n, own in rows.items() for row in own)


@pytest.mark.parametrize(
    ("row", "is_tiny"),
    [
        (ROWS[0], False),
        *(pytest.param(row, False, marks=pytest.mark.slow) for row in ROWS[1:]),
        *(pytest.param(row, True, marks=pytest.mark.slow) for row in ROWS),
    ],
)
def test_row_of_a_table_of_users_is_what_its_name_says(row, is_tiny):
    table, mode, *words = row.split("_")
    tiny = {"table4": "tiny-gpt2", "table8": "tiny-llama"}[table]
    config = composed(
        f"experiment={row}", *(["task=synthetic", f"model={tiny}"] if is_tiny else [])
    ).config
    kinds = [word for word in words if word in AdapterKind.__members__]
    merge = words[-1] if mode == "joint" else {"alone": "unmerged"}.get(mode, "merged")
    assert config.task.name == ("synthetic" if is_tiny else "dolly")
    assert config.users.name.name == mode
    assert config.users.names == list(CATEGORY_OPENINGS)  # Dolly's eight
    assert config.users.kinds == (kinds if len(kinds) > 1 else None)
    assert config.adapter.kind.name == kinds[0]
    assert config.merge.mode.name == merge
    prints_both = merge == "unmerged" and "mlp" not in kinds
    assert config.evaluation.merge.name == ("both" if prints_both else "auto")
    assert config.experiment_name == row
    assert len(describe_choice("experiment", row)) > 10
    if table == "table8":
        assert (config.model.sites, config.trainer.batch_size) == (["all"], 8)
    else:
        assert (config.model.sites, config.trainer.batch_size) == (["c_attn"], 32)
    if not is_tiny:
        assert config.model.name == {"table4": "gpt2", "table8": "llama-2-7b"}[table]
        is_slow = table == "table8" and kinds == ["linear"]  # paper, section C.1
        assert config.optimizer.lr == (5e-6 if is_slow else 3e-4)


def test_composition_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose_config([]).task.name == "digits"
    assert (conf_dir() / "config.yaml").is_file()


def test_packaged_conf_wins_over_a_neighbour(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "cola"
    for folder in (package / "conf", package.parent / "conf"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    monkeypatch.setattr("cola.__file__", str(package / "__init__.py"))
    assert conf_dir() == package / "conf"


def test_missing_conf_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("cola.__file__", str(tmp_path / "cola" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"conf/config\.yaml not found .* reinstall"):
        conf_dir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tsk=glue", r"^tsk=glue: no such group or key; nearest: task; groups: adapter, "),
        ("trainer.epoch=3", r"^trainer.epoch=3: no such key; nearest: trainer.epochs; allowed: "),
        ("trainr.epochs=3", r"nearest: trainer.epochs"),
        ("lr=1e-3", r"nearest: optimizer.lr"),
        ("+nothing.at.all=1", r"^\+nothing.at.all=1: no such group or key; groups"),
        ("adapter=lowrnk", r"no such choice of adapter; nearest: lowrank; allowed: linear, lowr"),
        ("adapter=null", r"adapter=null: no such choice of adapter"),
        ("optimizer=sgd", r"optimizer is a section, .* set one of optimizer.{name,lr,"),
        ("optimizer.name=sdg", r"wrong value; nearest: sgd; allowed: one of sgd, adamw"),
        ("trainer.epochs=many", r"trainer.epochs=many: wrong value; allowed: a whole number"),
        ("dry_run=maybe", r"wrong value; allowed: true or false"),
        ("model.sites={a:1}", r"wrong value; allowed: a list, each text or null"),
        ("adapter.hidden=[a]", r"wrong value; allowed: a list, each a whole number"),
        ("merge.reduce=sum", r"no such key; nearest: users.reduce; allowed: merge.{mode,"),
        ("users.adapters=a", r"wrong value; allowed: a list, each {user, kind, rank, hidden, alp"),
        ("users.adapters=[[1]]", r"wrong value; allowed: a list, each {user, kind"),
        ("users.adapters=null", r"wrong value; allowed: a list, each {user, kind"),
        ("users.adapters=[{usr:a}]", r"no such key 'usr' in an entry; nearest: user; allowed: us"),
        ("users.adapters=[{user:a,kind:mpl}]", r"of 'kind'; nearest: mlp; allowed: one of lowrank"),
        ("users.adapters={user:a,rank:x}", r"wrong value of 'rank'; allowed: a whole number or n"),
        ("users.schedule=[{join:3}]", r"an entry lacks 'user'; give it text"),
        ("task", r"^task: not an override \(.*\); write key=value"),
        ("adapter=mlp,linear", r"several values; add -m"),
        ("seed=range(1,4)", r"several values; add -m"),
        ("~adapter", r"adapter cannot be left out"),
        ("~trainer.epochs", r"a key cannot be deleted; set trainer.epochs to a whole number"),
        ("adapter@model=mlp", r"a group cannot be moved"),
        ("trainer.epochs=${nowhere}", r"'nowhere' not found; allowed: trainer.epochs is a whole"),
        ("task.num_labels=???", r"task.num_labels: no value given; set it to a whole number"),
        ("hydra.run.folder=x", r"hydra.run.folder: no such key; allowed: dir"),
        ("hydra/launcher=nowhere", r"Could not find 'hydra/launcher/nowhere'; allowed: basic"),
    ],
)
def test_override_that_cannot_be_meant(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config([override])
    assert "\n" not in str(caught.value)


def test_prefixes_mean_the_same_where_the_key_exists():
    assert compose_config(["+trainer.epochs=3"]).trainer.epochs == 3
    assert compose_config(["++trainer.epochs=3"]).trainer.epochs == 3
    assert compose_config(["+adapter=mlp"]).adapter.kind is AdapterKind.mlp
    assert compose_config(["~experiment"]).experiment_name is None


def test_free_dictionary_takes_any_key():
    config = compose_config(["model.architecture.extra.depth=3", "~model.architecture.hidden"])
    assert config.model.architecture["extra"] == {"depth": 3}
    assert "hidden" not in config.model.architecture


def test_own_search_path_brings_its_own_choices(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "wide.yaml").write_text("kind: lowrank\nrank: 64\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    assert compose_config([search, "adapter=wide"]).adapter.rank == 64
    with pytest.raises(ConfigError, match=r"Could not find 'adapter/wid'"):
        compose_config([search, "adapter=wid"])


def test_broken_yaml_of_ones_own_is_an_error_of_one_line(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "wide.yaml").write_text("kind: lowrank\nrnk: 64\n")
    with pytest.raises(ConfigError, match=r"adapter/wide.*'rnk' not in 'AdapterConfig'"):
        compose_config([f"hydra.searchpath=[file://{tmp_path}]", "adapter=wide"])


def test_nearest_finds_the_one_section_that_has_such_a_key():
    assert nearest("trainer.momentum", schema_keys()) == "optimizer.momentum"
    assert nearest("adapter.num", schema_keys()) == "users.num"


def test_nearest_gives_up_on_nonsense():
    assert nearest("qqqqqq", schema_keys()) is None


def test_run_folder_is_named_by_task_and_run():
    run = compose_run(["task=glue", "task.subset=mrpc", "seed=3"])
    assert run.run_dir.parent == Path("outputs/glue")
    assert run.run_dir.name.split("-", 2)[2].startswith("mrpc-cola-lowrank-s3-")
    assert compose_run(["method=ft"]).run_dir.name.split("-", 2)[2].startswith("digits-ft-s0-")
    assert composed("experiment=smoke").run_dir.parent == Path("outputs/smoke")
    assert compose_run(["hydra.run.dir=here/x"]).run_dir == Path("here/x")


def test_run_folders_are_unique():
    assert len({compose_run([]).run_dir for _ in range(2)}) == 2


def test_flatten_follows_the_schema():
    values = flatten(compose_config(["optimizer.clip=none", "merge=merged"]))
    assert list(values) == KEYS
    assert values["merge.mode"] is MergeMode.merged
    assert values["optimizer.clip"] is ClipMode["none"]
