"""Settings that a method does not have, or that do not fit together; no model is built."""

import json

import pytest
import yaml

from cola.config.choices import MethodName
from cola.config.groups import conf_dir
from cola.config.method_checks import METHOD_KEYS
from cola.config.schema import MethodConfig
from cola.config.validation import validate
from cola.errors import ConfigError
from tests.configs import changed

BASELINES = ("adalora", "ia3", "prompt", "prefix", "ptuning")
TEXT = ("task=synthetic",)


def check(*overrides: str) -> None:
    """Validates values as if each had been given explicitly; `method` is `method.name` there."""
    given = {override.partition("=")[0] for override in overrides}
    validate(changed(*overrides, base=TEXT), given)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("method.init_rank=0", "a whole number >= 1"),
        ("method.target_rank=0", "a whole number >= 1"),
        ("method.beta=1", "a number above 0, below 1"),
        ("method.delta_t=0", "a whole number >= 1"),
        ("method.init_ratio=1", "a number from 0 to below 1"),
        ("method.final_ratio=-0.1", "a number from 0 to below 1"),
        ("method.orth_weight=-1", "a number >= 0"),
        ("method.virtual_tokens=0", "a whole number >= 1"),
        ("method.init_text=' '", "a text that is not blank"),
        ("method.encoder_hidden=0", "a whole number >= 1"),
    ],
)
def test_value_out_of_range(override, allowed):
    with pytest.raises(ConfigError, match=rf"wrong value; allowed: {allowed}$"):
        validate(changed(override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=ia3", "method.init_rank=4"],
            r"^method.init_rank=4 has no effect with method=ia3",
        ),
        (
            ["method=prefix", "method.init_text=x"],
            r"with method=prefix; it is a setting of prompt:",
        ),
        (["method=lora", "method.sites=[query]"], r"it is a setting of adalora, ia3: leave it out"),
        (["method.virtual_tokens=5"], r"no effect with method=cola; .* prefix, prompt, ptuning"),
        (["method.activation_offload=true"], r"activation_offload=true has no effect with method"),
        (
            ["method=adalora", "method.target_rank=64"],
            r"init_rank=64: AdaLoRA takes ranks away; giv",
        ),
        (
            ["method=adalora", "method.init_ratio=0.5", "method.final_ratio=0.5"],
            r"init_ratio=0.5 and method.final_ratio=0.5 leave no part.*sum must be below 1",
        ),
        (["method=ia3", "adapter.rank=4"], r"^adapter.rank=4 does not apply to method=ia3, .*none"),
        (["method=adalora", "merge.mode=merged"], r"^merge.mode=merged does not apply to method=a"),
        (["method=prompt", "offload.name=cpu"], r"^offload.name=cpu does not apply to method=prom"),
        (["method=ptuning", "adapter.kind=lowrank"], r"^adapter.kind=lowrank does not apply to me"),
        (["method=ia3", "optimizer.clip=adapter"], r"only method=cola clips each adapter by itsel"),
        (["method=ia3", "evaluation.merge=merged"], r"only adapters of method=cola can be merged"),
        (
            ["method=prefix", "model.gradient_checkpointing=true"],
            r"^method=prefix with model.gradie",
        ),
    ],
)
def test_combination_that_cannot_run(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(*(one.replace("method=", "method.name=") for one in overrides))


@pytest.mark.parametrize("mode", ["alone", "collaboration"])
def test_users_with_adapters_of_their_own_need_cola(mode):
    # In a file as well: without them it would be another experiment.
    with pytest.raises(ConfigError, match=rf"^users={mode} with method=lora: .* use users=one or "):
        validate(changed("method.name=lora", "optimizer.clip=none", base=(f"users={mode}",)))


@pytest.mark.parametrize("method", ["ft", "lora", "ia3"])
def test_joint_users_are_everybodys(method):
    names = ("users.num=2", "users.column=who", "users.names=[a, b]", "users.others=drop")
    check(f"method.name={method}", "users.name=joint", *names)
    with pytest.raises(ConfigError, match=r"users\.num would have no effect with users=one"):
        check(f"method.name={method}", "users.num=2")


def test_activation_offload_in_a_file_is_refused_too():
    with pytest.raises(ConfigError, match="has no effect with method=cola, which keeps no"):
        validate(changed("method.activation_offload=true"))


@pytest.mark.parametrize("method", BASELINES)
def test_images_have_no_such_method(method):
    with pytest.raises(ConfigError, match=rf"^method={method} with model=mlp: .*cola, ft or lora"):
        validate(changed(f"method.name={method}", "optimizer.clip=none"))


@pytest.mark.parametrize("method", BASELINES)
def test_own_keys_are_taken(method):
    name, values = MethodName[method], MethodConfig()
    own = [key for key, methods in METHOD_KEYS.items() if name in methods]
    check(
        f"method.name={method}",
        *(f"method.{key}={json.dumps(getattr(values, key))}" for key in own),
    )


def test_files_of_the_group_state_the_defaults_of_their_own_keys():
    defaults = vars(MethodConfig())
    for path in sorted((conf_dir() / "method").glob("*.yaml")):
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = MethodName[stated.pop("name")]
        assert path.stem == name.name
        assert stated == {key: defaults[key] for key in stated}
        assert all(name in METHOD_KEYS[key] for key in stated)


def test_every_key_of_the_group_belongs_to_a_method():
    assert set(METHOD_KEYS) == set(vars(MethodConfig())) - {"name"}
