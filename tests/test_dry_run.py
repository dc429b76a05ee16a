"""A dry run's facts: the published counts, bytes on the wire, memory by owner; offline."""

import dataclasses
import functools
import socket

import pytest

from cola.config.choices import AdapterKind
from cola.dry_run import DryRun, estimate, print_dry_run
from cola.errors import ConfigError
from cola.memory_plan import Traffic
from tests.configs import composed
from tests.runs import run

ROBERTA = "task=glue"
CLASSIFIES = ("task.objective=classification",)
MNIST = "task.image_shape=[1,28,28]"
CIFAR10 = "task.image_shape=[3,32,32]"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@functools.cache
def facts(*overrides: str) -> DryRun:
    return estimate(composed("dry_run=true", *overrides).config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "trainable"), [("lowrank", 887_042), ("linear", 14_747_906), ("mlp", 8_484_098)]
)
def test_counts_of_roberta_base(adapter, trainable):
    dry = facts(ROBERTA, f"adapter={adapter}", "offload=cpu")
    assert (dry.sites, dry.trainable_parameters) == (26, trainable)


# Method, section 4: lowrank, linear, mlp.
WRITER_COUNTS = {
    ("bart-base",): (36, [442_368, 21_233_664, 11_837_952]),
    ("gpt2",): (12, [294_912, 21_233_664, 8_683_008]),
    ("llama-2-7b",): (64, [4_194_304, 1_073_741_824, 103_047_168]),
    ("llama-2-7b", "model.sites=all"): (224, [19_988_480, 6_476_005_376, 502_665_216]),
}


@pytest.mark.parametrize("overrides", WRITER_COUNTS, ids=" ".join)
def test_counts_of_models_that_write(monkeypatch, overrides):
    monkeypatch.setattr("cola.dry_run._trace", lambda *_: (Traffic(), 0))  # 224 sites take a second
    sites, counts = WRITER_COUNTS[overrides]
    config = composed("task=synthetic", f"model={overrides[0]}", *overrides[1:]).config
    for kind, trainable in zip(("lowrank", "linear", "mlp"), counts, strict=True):
        adapter = dataclasses.replace(config.adapter, kind=AdapterKind[kind])
        dry = estimate(dataclasses.replace(config, adapter=adapter, dry_run=True))
        assert (dry.sites, dry.trainable_parameters) == (sites, trainable)


@pytest.mark.parametrize(
    ("model", "sites", "num_bytes"),
    [
        # Every site's gradient; inputs of 12 blocks, 6 cross queries, and the encoder's output.
        ("bart-base", 36, (36 + 12 + 6 + 1) * 768 * 4),
        ("gpt2", 12, 12 * (768 + 3 * 768) * 4),
        pytest.param("llama-2-7b", 64, (64 + 32) * 4096 * 2, marks=pytest.mark.slow),
    ],
)
def test_wire_of_models_that_write_is_that_of_every_token(model, sites, num_bytes):
    dry = facts("task=synthetic", f"model={model}", "offload=cpu")
    assert dry.sites == sites
    assert dry.wire_out_bytes == 32 * 32 * num_bytes


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
def test_models_that_write_can_be_estimated_as_classifiers(model):
    dry = facts(ROBERTA, f"model={model}", *CLASSIFIES, "adapter.rank=1")
    inner = facts("task=synthetic", f"model={model}", "adapter.rank=1")
    assert dry.sites == inner.sites + 1
    assert dry.trainable_parameters == inner.trainable_parameters + 2 * 64


def test_classifier_that_looks_at_its_inputs_cannot_be_estimated():
    with pytest.raises(ConfigError, match=r"dry_run=true: tiny-bart.*use trainer\.max_steps=1"):
        facts(ROBERTA, "model=tiny-bart", *CLASSIFIES)


def test_gradient_checkpointing_keeps_less():
    plain, saving = (
        facts("task=synthetic", "model=tiny-bart", f"model.gradient_checkpointing={given}")
        for given in ("false", "true")
    )
    kept = "kept for the backward pass"
    assert saving.memory_bytes["base"][kept] < plain.memory_bytes["base"][kept]
    assert saving.trainable_parameters == plain.trainable_parameters


IMAGE_COUNTS = {
    ("linear", MNIST): (1, [6_352, 7_850, 136_074]),
    ("linear", CIFAR10): (1, [24_656, 30_730, 428_938]),
    ("mlp", MNIST): (3, [12_496, 136_074, 350_218]),
    ("mlp", CIFAR10): (3, [30_800, 428_938, 643_082]),
    ("cnn", MNIST): (5, [44_184, 1_554_954, 538_058]),
    ("cnn", CIFAR10): (5, [44_328, 1_556_106, 538_314]),
}


@pytest.mark.parametrize(("model", "shape"), IMAGE_COUNTS)
def test_counts_of_image_models(model, shape):
    sites, counts = IMAGE_COUNTS[model, shape]
    config = composed("task=mnist", f"model={model}", shape).config
    for kind, trainable in zip(("lowrank", "linear", "mlp"), counts, strict=True):
        adapter = dataclasses.replace(config.adapter, kind=AdapterKind[kind])
        dry = estimate(dataclasses.replace(config, adapter=adapter))
        assert (dry.sites, dry.trainable_parameters) == (sites, trainable)


@pytest.mark.parametrize(
    ("overrides", "trainable"),
    [((ROBERTA,), 887_042), (("task=mnist", "model=cnn"), 44_184), (("task=mnist",), 12_496)],
)
def test_counts_of_lora_are_those_of_lowrank(overrides, trainable):
    assert facts(*overrides, "method=lora").trainable_parameters == trainable


def test_counts_of_full_fine_tuning_are_all_parameters():
    dry = facts(ROBERTA, "method=ft")
    assert dry.trainable_parameters == dry.base_parameters == 124_647_170


def test_counts_follow_the_labels_of_a_subset():
    dry = facts(ROBERTA, "task.subset=mnli")
    assert dry.trainable_parameters == 887_042 + 769  # three labels


def test_wire_of_roberta_base_when_offloaded():
    dry = facts(ROBERTA, "adapter=lowrank", "offload=cpu")  # batch 32, length 128
    bodies = 12 * 3 * 32 * 128 * 768 * 4  # q and v: one x and two gradients, float32
    heads = 32 * (768 + 768 + 768 + 2) * 4
    assert dry.wire_out_bytes == bodies + heads
    assert dry.wire_back_bytes == 887_042 * 4


@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16"])
def test_wire_of_formed_gradients_is_that_of_the_adapters(model_dtype):
    llama = ("task=synthetic", "model=tiny-llama", "adapter=linear", f"model.dtype={model_dtype}")
    dry = facts(*llama, "offload=cpu", "offload.payload=gradient")
    assert dry.wire_out_bytes == 4 * dry.trainable_parameters
    rounded = facts(
        *llama, "offload=cpu", "offload.payload=gradient", "offload.wire_dtype=bfloat16"
    )
    assert rounded.wire_out_bytes == 2 * dry.trainable_parameters


def test_a_wire_of_bfloat16_carries_half():
    plain = facts("task=synthetic", "model=tiny-llama", "offload=cpu")
    rounded = facts(
        "task=synthetic", "model=tiny-llama", "offload=cpu", "offload.wire_dtype=bfloat16"
    )
    assert 2 * rounded.wire_out_bytes == plain.wire_out_bytes
    assert rounded.wire_back_bytes == plain.wire_back_bytes


def test_hidden_inputs_that_leave_are_not_kept():
    kept = {
        choice: facts("task=synthetic", "model=tiny-llama", *choice.split()).memory_bytes["base"][
            "kept for the backward pass"
        ]
        for choice in ("offload=none", "offload=cpu", "offload=cpu offload.payload=gradient")
    }
    assert kept["offload=cpu"] < kept["offload=none"]
    assert kept["offload=cpu offload.payload=gradient"] == kept["offload=none"]


@pytest.mark.parametrize(
    "overrides", [("offload=none",), ("method=lora",), ("method=ft",)], ids=" ".join
)
def test_nothing_travels_without_offload(overrides):
    dry = facts("task=synthetic", *overrides)
    assert (dry.wire_out_bytes, dry.wire_back_bytes) == (0, 0)


def test_merged_weights_travel_back_when_merged():
    dry = facts("task=synthetic", "offload=cpu", "merge=merged")
    assert dry.wire_back_bytes == (4 * 64 * 64 + 64 * 64 + 64 * 2) * 4  # q, v, the two heads


def test_factors_travel_back_where_the_base_device_keeps_pristine_weights():
    common = ("task=synthetic", "model=tiny-llama", "offload=cpu", "merge=merged")
    dry = facts(*common, "merge.pristine=base", "adapter.rank=1")
    assert dry.wire_back_bytes == dry.trainable_parameters * 4
    whole = facts(*common, "merge.pristine=base", "adapter=linear")
    assert whole.wire_back_bytes == facts(*common, "adapter=linear").wire_back_bytes


def test_bfloat16_halves_the_wire():
    wide, narrow = (
        facts("task=synthetic", "offload=cpu", f"model.dtype={dtype}").wire_out_bytes
        for dtype in ("float32", "bfloat16")
    )
    assert wide == 2 * narrow


def test_memory_of_adapters_is_on_the_host_when_offloaded():
    dry = facts("task=synthetic", "offload=cpu")
    size = dry.trainable_parameters * 4
    base, host = dry.memory_bytes["base"], dry.memory_bytes["host"]
    assert base["adapters"] == size
    assert (host["adapters"], host["gradients"], host["optimizer"]) == (size, size, 2 * size)
    assert "optimizer" not in base


def test_memory_of_the_base_device_is_independent_of_the_adapter_when_merged():
    bases = [
        facts("task=synthetic", "offload=cpu", "merge=merged", *adapter).memory_bytes["base"]
        for adapter in (["adapter=lowrank"], ["adapter=linear"], ["adapter.rank=32"])
    ]
    assert bases[0] == bases[1] == bases[2]
    assert "adapters" not in bases[0]


def test_memory_of_pristine_weights_lies_where_they_are_kept():
    merged = ("task=synthetic", "offload=cpu", "merge=merged")
    weights = (4 * 64 * 64 + 64 * 64 + 64 * 2) * 4
    assert facts(*merged).memory_bytes["host"]["pristine weights"] == weights
    assert facts(*merged).memory_bytes["host"]["merged weights"] == weights
    on_base = facts(*merged, "merge.pristine=base").memory_bytes
    assert on_base["base"]["pristine weights"] == weights
    assert not {"pristine weights", "merged weights"} & on_base["host"].keys()
    stays = facts("task=synthetic", "merge=merged").memory_bytes
    assert stays["base"]["merged weights"] == stays["host"]["pristine weights"] == weights


def test_data_in_flight_is_what_the_workers_of_a_host_have():
    """All inputs of a batch, and three blocks of a thread; or two steps, where that is less."""
    common = ("task=synthetic", "model=gpt2", "offload=cpu")
    rows = 32 * 32 * 4  # batch, tokens, bytes
    name = "adaptation data in flight, at most"
    one, two, many = (
        facts(*common, f"offload.workers={num}").memory_bytes["host"][name] for num in (1, 2, 9)
    )
    inputs, block = (
        12 * 768 * rows,
        4 * 768 * rows,
    )  # c_attn: an input, three times as wide an answer
    assert (one, two) == (inputs + 3 * block, inputs + 6 * block)
    assert many == 2 * 12 * block


def test_gradients_of_large_adapters_are_there_as_long_as_they_are_fitted(sized):
    """A thread has three blocks; small adapters step together."""
    common = ("task=synthetic", "model=gpt2", "offload=cpu", "offload.workers=2")
    large = sized(*common, "adapter=linear").memory_bytes["host"]
    assert large["gradients"] == 2 * 3 * 768 * 2304 * 4
    assert 2 * large["gradients"] == large["adapters"]
    for setting in ("trainer.interval=2", "optimizer.clip=global", "offload.workers=9"):
        host = sized(*common, "adapter=linear", setting).memory_bytes["host"]
        assert host["gradients"] == host["adapters"]
    mixed = sized(*common, "adapter=lowrank").memory_bytes["host"]
    assert mixed["gradients"] == mixed["adapters"]


def test_memory_of_baselines_is_on_the_base_device():
    lora, ft = (facts("task=synthetic", f"method={method}") for method in ("lora", "ft"))
    assert set(lora.memory_bytes) == set(ft.memory_bytes) == {"base"}
    assert lora.memory_bytes["base"]["adapters"] == lora.trainable_parameters * 4
    assert ft.memory_bytes["base"]["optimizer"] == 2 * ft.base_parameters * 4
    assert "adapters" not in ft.memory_bytes["base"]


def test_memory_of_sgd_has_one_moment():
    dry = facts("task=mnist", "optimizer.name=sgd")
    assert dry.memory_bytes["base"]["optimizer"] == dry.trainable_parameters * 4


# Users -------------------------------------------------------------------------------------------

# Tables 4 and 8 print 8 x, or 4 x + 4 x, of these.
GPT2 = {"lowrank": 294_912, "linear": 21_233_664, "mlp": 8_683_008}
LLAMA_ALL = {"lowrank": 19_988_480, "mlp": 502_665_216}
ALONE = ("task=synthetic", "users=alone", "offload=cpu")


@pytest.fixture
def sized(monkeypatch):
    """Facts without those of a forward pass, which takes most of the time."""
    monkeypatch.setattr("cola.dry_run._trace", lambda *_: (Traffic(), 0))
    return lambda *overrides: estimate(composed("dry_run=true", *overrides).config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "trainable"),
    [
        ("table4_joint_lowrank_merged", GPT2["lowrank"]),
        ("table4_alone_lowrank", 8 * GPT2["lowrank"]),
        ("table4_alone_lowrank_linear", 4 * GPT2["lowrank"] + 4 * GPT2["linear"]),
        ("table4_alone_lowrank_mlp", 4 * GPT2["lowrank"] + 4 * GPT2["mlp"]),
        ("table4_collaboration_lowrank", 8 * GPT2["lowrank"]),
        ("table4_collaboration_lowrank_linear", 4 * GPT2["lowrank"] + 4 * GPT2["linear"]),
        ("table8_alone_lowrank", 8 * LLAMA_ALL["lowrank"]),
        ("table8_alone_lowrank_mlp", 4 * LLAMA_ALL["lowrank"] + 4 * LLAMA_ALL["mlp"]),
        ("table8_collaboration_lowrank", 8 * LLAMA_ALL["lowrank"]),
    ],
)
def test_counts_of_users_are_those_of_the_paper(sized, row, trainable):
    dry = sized(f"experiment={row}")
    assert dry.trainable_parameters == trainable
    assert dry.users == (1 if "joint" in row else 8)


def test_users_without_names_are_counted(sized):
    one, many = sized("task=synthetic", "offload=cpu"), sized(*ALONE, "users.num=300")
    assert many.users == 300
    assert many.trainable_parameters == 300 * one.trainable_parameters
    assert many.wire_back_bytes == 300 * one.wire_back_bytes


def test_users_who_are_not_known_without_data(sized):
    with pytest.raises(ConfigError, match=r"with users=alone: .* set users\.num or users\.names$"):
        sized(*ALONE)
    with pytest.raises(ConfigError, match=r"with settings of user 'a': .*; set users\.names$"):
        sized(*ALONE, "users.num=2", "users.schedule={user:a}")
    assert sized(*ALONE, "users.num=2", "users.adapters={user:user2,rank:3}").users == 2


def test_ranks_that_differ_are_filled_up_where_they_are_stacked(sized):
    names = (*ALONE, "users.names=[a,b,c]")
    small, large = sized(*names, "adapter.rank=2"), sized(*names, "adapter.rank=5")
    mixed = sized(*names, "adapter.rank=2", "users.adapters={user:b,rank:5}")
    assert mixed.wire_back_bytes == large.wire_back_bytes
    assert mixed.memory_bytes["base"]["adapters"] == large.memory_bytes["base"]["adapters"]
    assert mixed.memory_bytes["host"]["optimizer"] == large.memory_bytes["host"]["optimizer"]
    per_user = (large.trainable_parameters - small.trainable_parameters) // 3
    assert mixed.trainable_parameters == small.trainable_parameters + per_user


def test_ranks_of_other_cohorts_are_not_filled_up(sized):
    names = (*ALONE, "users.names=[a,b]", "adapter.rank=2")
    apart = sized(*names, "users.adapters={user:b,rank:5,optimizer:sgd}")
    assert apart.memory_bytes["base"]["adapters"] == 4 * apart.trainable_parameters


def test_users_keep_the_moments_of_their_own_optimizers(sized):
    names = (*ALONE, "users.names=[a,b]")
    adam, one_sgd = sized(*names), sized(*names, "users.adapters={user:b,optimizer:sgd}")
    size = adam.memory_bytes["host"]["adapters"]
    assert adam.memory_bytes["host"]["optimizer"] == 2 * size
    assert one_sgd.memory_bytes["host"]["optimizer"] == 1.5 * size


def test_users_who_fit_elsewhere_keep_no_moments_here(sized):
    names = (*ALONE, "users.names=[a,b]")
    here, away = sized(*names), sized(*names, "users.local=[b]")
    assert away.memory_bytes["host"]["adapters"] == here.memory_bytes["host"]["adapters"]
    for owner in ("gradients", "optimizer"):
        assert 2 * away.memory_bytes["host"][owner] == here.memory_bytes["host"][owner]
    assert away.trainable_parameters == here.trainable_parameters


def test_memory_of_the_base_device_is_independent_of_the_number_of_users_when_merged(sized):
    few, many = (
        sized("task=synthetic", "users=collaboration", "offload=cpu", f"users.num={num}")
        for num in (2, 50)
    )
    assert few.memory_bytes["base"] == many.memory_bytes["base"]
    assert few.wire_back_bytes == many.wire_back_bytes
    assert many.memory_bytes["host"]["adapters"] == 25 * few.memory_bytes["host"]["adapters"]


def test_rows_of_each_kind_keep_what_that_kind_needs():
    kinds = ("adapter=lowrank", "adapter=mlp", "users.kinds=lowrank-mlp")
    dry = [facts(*ALONE, "users.num=4", given) for given in kinds]
    lowrank, mlp, mixed = (one.memory_bytes["base"]["kept for the backward pass"] for one in dry)
    assert lowrank < mixed < mlp
    assert len({one.wire_out_bytes for one in dry}) == 1  # one forward pass for all


def test_table_states_the_number_of_users(capsys):
    print_dry_run(composed("task=synthetic", "users=alone", "users.num=3", "dry_run=true").config)
    assert "| users with adapters (K)" in capsys.readouterr().out


def test_table_states_the_facts(capsys):
    print_dry_run(composed(ROBERTA, "dry_run=true", "offload=cpu").config)
    lines = capsys.readouterr().out.splitlines()
    cells = {c[1]: c[2] for line in lines if len(c := [x.strip() for x in line.split("|")]) == 4}
    assert cells["task"] == "glue/mrpc"
    assert cells["sites (M)"] == "26"
    assert cells["base parameters"] == "124,647,170"
    assert cells["trainable parameters"] == "887,042"
    assert cells["wire, base to offload, MiB per step (batch 32, length 128)"] == "432.28"
    assert any(line.startswith("| host   | optimizer") for line in lines)


def test_table_of_images_has_no_length(capsys):
    print_dry_run(composed("task=mnist", "dry_run=true").config)
    assert "MiB per step (batch 256)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(("model=tiny-gpt2",), marks=pytest.mark.slow), ("adapter=mlp",)],
    ids=" ".join,
)
def test_counts_are_those_of_the_run(tmp_path, overrides):
    settings = ("task=synthetic", "task.max_train_rows=32", *overrides)
    summary = run(tmp_path, *settings, "trainer.max_steps=1").summary
    dry = facts(*settings)
    assert summary["trainable_parameters"] == dry.trainable_parameters
    assert summary["sites"] == dry.sites
