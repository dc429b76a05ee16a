"""What every user trains, lists of entries in a configuration, and whom an evaluation asks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cola.config.choices import AdapterKind, OptimizerName, UsersMode
from cola.config.evaluation import resolve_request
from cola.config.groups import conf_dir
from cola.config.identity import config_hash, config_values, load_config, save_config
from cola.config.keys import find_key, word
from cola.config.resume import merge_given
from cola.config.schema import (
    AdapterConfig,
    ExperimentConfig,
    OptimizerConfig,
    UserAdapterConfig,
    UsersConfig,
    UserVisitConfig,
)
from cola.config.store import compose_config, compose_run
from cola.config.user_checks import SEVERAL_USERS
from cola.config.user_settings import expand_kinds, lowrank_sizes, resolve_users
from cola.errors import ConfigError
from tests.configs import changed

ALONE = ("users=alone",)
NAMES = ("a", "b", "c", "d")
LOWRANK, LINEAR, MLP = AdapterKind.lowrank, AdapterKind.linear, AdapterKind.mlp


def resolved(*overrides: str, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """Settings by name, in the run's order."""
    config = changed("optimizer.lr=0.5", *overrides, base=ALONE)
    return {user.name: user for user in resolve_users(config, names)}


def kinds(*overrides: str, names: tuple[str, ...] = NAMES) -> dict[str, AdapterKind]:
    return {name: user.kind for name, user in resolved(*overrides, names=names).items()}


# Settings of every user --------------------------------------------------------------------------


def test_users_have_what_the_run_has():
    users = resolved("adapter.rank=3", "adapter.alpha=2", "optimizer.name=sgd")
    assert list(users) == list(NAMES)
    assert {(u.kind, u.rank, u.hidden, u.alpha, u.rate, u.optimizer) for u in users.values()} == {
        (LOWRANK, 3, (128, 256), 2.0, 1.0, OptimizerName.sgd)
    }


def test_single_user_differs_in_every_setting():
    entry = "{user: b, kind: mlp, hidden: [5], alpha: 4, lr: 0.1, optimizer: adamw}"
    users = resolved(f"users.adapters=[{entry}, {{user: c, rank: 2}}]", "optimizer.name=sgd")
    b, c, d = users["b"], users["c"], users["d"]
    assert (b.kind, b.hidden, b.alpha, b.optimizer) == (MLP, (5,), 4.0, OptimizerName.adamw)
    assert b.rate == pytest.approx(0.2)
    assert (c.rank, d.rank, c.kind) == (2, 8, LOWRANK)
    assert c == dataclasses.replace(d, name="c", rank=2)


def test_local_users_are_marked():
    users = resolved("users.local=[b, d]")
    assert [name for name, user in users.items() if user.is_local] == ["b", "d"]


def test_users_of_one_cohort_are_neighbours_in_order_of_first_appearance():
    users = resolved(
        "users.adapters=[{user: a, kind: mlp}, {user: c, kind: mlp}, {user: e, optimizer: sgd}, "
        "{user: f, kind: mlp, hidden: [4]}, {user: g, rank: 1}]",
        "optimizer.name=adamw",
        names=("a", "b", "c", "d", "e", "f", "g"),
    )
    assert list(users) == ["a", "c", "b", "d", "g", "e", "f"]
    assert len({user.cohort for user in users.values()}) == 4


def test_widths_of_other_kinds_tell_no_cohorts_apart():
    (a, *_) = resolved().values()
    assert a.cohort == dataclasses.replace(a, hidden=(1,)).cohort


@pytest.mark.parametrize("given", ["[lowrank-linear]", "[lowrank, linear]"])
def test_kinds_go_to_equal_parts_in_order(given):
    names = tuple("abcdefgh")
    found = kinds(f"users.kinds={given}", names=names)
    assert found == dict(zip(names, [LOWRANK] * 4 + [LINEAR] * 4, strict=True))


def test_kind_for_every_user_by_place():
    found = kinds("users.kinds=[lowrank, mlp, lowrank, linear]")
    assert found == {"a": LOWRANK, "c": LOWRANK, "b": MLP, "d": LINEAR}
    assert list(found) == ["a", "c", "b", "d"]


def test_own_kind_wins_over_that_of_the_part():
    found = kinds("users.kinds=[lowrank, linear]", "users.adapters=[{user: a, kind: linear}]")
    assert found == {"a": LINEAR, "c": LINEAR, "d": LINEAR, "b": LOWRANK}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6))
def test_parts_are_contiguous_and_as_equal_as_possible(num_users, num_parts):
    dealt = [list(AdapterKind)[i % 3] for i in range(min(num_parts, num_users))]
    config = ExperimentConfig(
        adapter=AdapterConfig(kind=LOWRANK),
        users=UsersConfig(name=UsersMode.alone, kinds=[kind.name for kind in dealt]),
        optimizer=OptimizerConfig(lr=1.0),
    )
    names = [f"u{i}" for i in range(num_users)]
    found = {user.name: user.kind for user in resolve_users(config, names)}
    in_order = [found[name] for name in names]
    changes = [i for i in range(1, num_users) if in_order[i] is not in_order[i - 1]]
    sizes = [end - start for start, end in zip([0, *changes], [*changes, num_users], strict=True)]
    assert [in_order[start] for start in [0, *changes]] == dealt
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["lowrank-linear"], [LOWRANK, LINEAR]),
        (["lowrank-mlp"], [LOWRANK, MLP]),
        (["mlp", "lowrank-linear"], [MLP, LOWRANK, LINEAR]),
    ],
)
def test_names_of_kinds(given, expected):
    assert expand_kinds(given) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["users.adapters=[{user: aa}]"], r"users\.adapters: no user 'aa'; nearest: a; allowed: a"),
        (["users.schedule=[{user: x}]"], r"users\.schedule: no user 'x'; allowed: a, b, c, d$"),
        (["users.local=[x]"], r"users\.local: no user 'x'"),
        (["users.adapters=[{user: a, hidden: [3]}]"], r"hidden of user 'a' .* its lowrank "),
        (
            ["users.kinds=[lowrank, mlp]", "users.adapters=[{user: d, rank: 3}]"],
            r"rank of user 'd' would have no effect with its mlp adapters; .* kind: lowrank",
        ),
        (["users.kinds=[mlp, linear, mlp, linear, mlp]"], r"gives 5 kinds to 4 users; give at mo"),
    ],
)
def test_settings_that_the_users_do_not_fit(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolved(*overrides)


@pytest.mark.parametrize("name", ["", " ", ".", ".."])
def test_user_without_a_usable_name(name):
    with pytest.raises(ConfigError, match=f"'{name}' cannot be a user's name"):
        resolved(names=("a", name))


def test_many_users_are_not_all_listed():
    with pytest.raises(ConfigError, match=r"u8, u9, \.\.\. \(30 in all\)$"):
        resolved("users.local=[zzz]", names=tuple(f"u{i}" for i in range(30)))


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], [8]),
        (["adapter.kind=mlp"], []),
        (["users.kinds=[linear, mlp]", "users.adapters=[{user: a, kind: lowrank}]"], [8]),
        (["users.adapters=[{user: a, rank: 40}, {user: b, kind: mlp}]"], [8, 40]),
    ],
)
def test_ranks_that_a_run_may_have(overrides, sizes):
    assert list(lowrank_sizes(changed(*overrides, base=ALONE)).values()) == sizes


def test_a_rank_is_named_by_what_sets_it():
    given = changed("users.adapters=[{user: a, rank: 40}]", base=ALONE)
    assert lowrank_sizes(given) == {"adapter.rank": 8, "rank of user 'a' (users.adapters)": 40}


def test_files_of_the_group_state_the_defaults_of_the_keys_that_apply():
    defaults = {**vars(changed().users)}
    everything = set(vars(UsersConfig()))
    applying = {
        UsersMode.one: {"name"},
        UsersMode.joint: {"name", *SEVERAL_USERS},
        UsersMode.alone: everything - {"gradient"},
        UsersMode.collaboration: everything,
    }
    for path in sorted((conf_dir() / "users").glob("*.yaml")):
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
        stated.pop("defaults", None)
        assert stated.keys() == applying[UsersMode[path.stem]]
        assert stated.pop("name") == path.stem
        assert {key: word(value) for key, value in stated.items()} == {
            key: word(defaults[key]) for key in stated
        }


# Lists of entries, wherever a key is looked at ---------------------------------------------------

ENTRIES = (
    *ALONE,
    "users.adapters=[{user:a,kind:mlp,hidden:[5]},{user:b,rank:4,optimizer:sgd}]",
    "users.schedule=[{user:a,join:3,leave:9}]",
)


def test_entries_on_the_command_line():
    users = compose_config(ENTRIES).users
    assert users.adapters == [
        UserAdapterConfig(user="a", kind=MLP, hidden=[5]),
        UserAdapterConfig(user="b", rank=4, optimizer=OptimizerName.sgd),
    ]
    assert users.schedule == [UserVisitConfig(user="a", join=3, leave=9)]


def test_one_entry_stands_for_a_list_of_one():
    users = compose_config([*ALONE, "users.adapters={user:a,rank:4}"]).users
    assert users.adapters == [UserAdapterConfig(user="a", rank=4)]


def test_entries_in_a_file(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nusers:\n  adapters: [{user: a, kind: mlp}]\n"
    )
    config = compose_config([f"hydra.searchpath=[file://{tmp_path}]", *ALONE, "experiment=mine"])
    assert config.users.adapters == [UserAdapterConfig(user="a", kind=MLP)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("user: a, knd: mlp", r"experiment/mine.*'knd' not in 'UserAdapterConfig'"),
        ("user: a, kind: mpl", r"'mpl', expected one of \[lowrank, linear, mlp\]"),
        ("kind: mlp", r"users\.adapters\[0\]\.user: no value given; set it to text"),
    ],
)
def test_entry_in_a_file_that_cannot_be_meant(tmp_path, entry, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nusers:\n  adapters: [{{{entry}}}]\n"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config([f"hydra.searchpath=[file://{tmp_path}]", *ALONE, "experiment=mine"])
    assert "\n" not in str(caught.value)


def test_entries_survive_the_file(tmp_path):
    config = compose_config(ENTRIES)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_values(config)["users"]["adapters"][1]["optimizer"] == "sgd"


def test_hash_sees_entries():
    hashes = {
        config_hash(changed(*overrides, base=ALONE))
        for overrides in (
            [],
            ["users.adapters=[{user: a}]"],
            ["users.adapters=[{user: a, kind: mlp}]"],
            ["users.adapters=[{user: a, hidden: [3]}]"],
            ["users.schedule=[{user: a}]"],
            ["users.kinds=[lowrank, linear]"],
        )
    }
    assert len(hashes) == 6


def test_resumed_run_names_entries_as_they_are_written():
    stored = changed("users.adapters=[{user: a, rank: 4}]", base=ALONE)
    asked = changed("users.adapters=[{user: a, kind: mlp, hidden: [5]}]", base=ALONE)
    _, differing = merge_given(stored, asked, ["users.adapters"], may_change=lambda _: False)
    assert differing == [
        "users.adapters ([{user:a,rank:4}] there, [{user:a,kind:mlp,hidden:[5]}] given)"
    ]
    _, differing = merge_given(stored, stored, ["users.adapters"], may_change=lambda _: False)
    assert differing == []


def test_keys_reach_into_entries():
    key = find_key("users.adapters[0].kind")
    assert key is not None
    assert key.choices == ["lowrank", "linear", "mlp"]
    assert find_key("users.adapters[0]") == find_key("users.adapters")
    assert find_key("users.nobody[0].kind") is None


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["users=joint"], "digits-cola-joint-lowrank-s0-"),
        (["users=alone", "adapter=linear"], "digits-cola-alone-linear-s0-"),
        (["users=alone", "users.kinds=[mlp,lowrank,mlp]"], "digits-cola-alone-mlp-lowrank-s0-"),
        (["users=collaboration"], "digits-cola-collaboration-lowrank-s0-"),
        (["users=joint", "method=lora"], "digits-lora-joint-s0-"),
    ],
)
def test_run_folder_says_who_learns(overrides, label):
    assert compose_run(overrides).run_dir.name.split("-", 2)[2].startswith(label)


# Whom cola-evaluate asks -------------------------------------------------------------------------


def stored_run(folder: Path, *overrides: str, base: tuple[str, ...] = ALONE) -> dict[str, str]:
    save_config(changed(*overrides, base=base), folder / "config.yaml")
    return {"run": str(folder)}


def test_prompt_is_answered_by_a_user(tmp_path):
    own = stored_run(tmp_path)
    assert resolve_request({**own, "prompt": "x", "user": "b"}).user == "b"
    assert resolve_request({**own, "prompt": "x"}).user is None


@pytest.mark.parametrize(
    ("overrides", "base", "own", "message"),
    [
        ([], ALONE, {}, r"^user=bb: says whose adapters answer a prompt, .* add prompt=TEXT"),
        (["users.names=[b, c]"], ALONE, {"prompt": "x"}, r"^user=bb: no such user .*nearest: b; "),
        ([], (), {"prompt": "x"}, r"^user=bb: the run has users=one, .*; leave user out"),
        ([], ("users=joint",), {"prompt": "x"}, r"users=joint, one set of adapters"),
    ],
)
def test_user_who_cannot_be_asked(tmp_path, overrides, base, own, message):
    with pytest.raises(ConfigError, match=message):
        resolve_request({**stored_run(tmp_path, *overrides, base=base), **own, "user": "bb"})


def test_evaluation_needs_nothing_that_users_started_from(tmp_path):
    own = stored_run(tmp_path, "users.schedule=[{user: a, join: 2, init: gone}]")
    assert resolve_request(own).config.users.schedule == [UserVisitConfig(user="a", join=2)]
