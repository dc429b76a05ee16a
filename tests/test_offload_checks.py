"""Settings of `offload` that have no effect or cannot be had; GPUs that are not there."""

import pytest
import torch

from cola.cli import train as command
from cola.cli.app import run_command
from cola.cli.outcome import BAD_CONFIG
from cola.config.choices import OffloadTarget, WireDType
from cola.config.schema import OffloadConfig
from cola.config.validation import validate
from cola.errors import ConfigError
from cola.offload import placing
from cola.offload.placing import resolve_offload
from tests.configs import changed

CPU, FIRST_GPU = torch.device("cpu"), torch.device("cuda", 0)
OF_USERS = ("task=synthetic", "model=tiny-gpt2", "users=alone")


def check(*overrides: str, base: tuple[str, ...] = ()) -> None:
    """Validates values as if each had been given explicitly."""
    validate(changed(*overrides, base=base), {override.partition("=")[0] for override in overrides})


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("offload.staleness=2", "0 or 1"),
        ("offload.staleness=-1", "0 or 1"),
        ("offload.workers=0", "a whole number >= 1, or null"),
    ],
)
def test_value_out_of_range(override, allowed):
    with pytest.raises(ConfigError, match=rf"wrong value; allowed: {allowed}$"):
        check(override, base=("offload=cpu",))


BOTH = "use offload=cpu or offload=gpu, or leave it out$"


@pytest.mark.parametrize(
    ("target", "override", "advice"),
    [
        ("none", "offload.device=[cuda:1]", "use offload=gpu, or leave it out$"),
        ("cpu", "offload.device=[cuda:1]", "use offload=gpu, or leave it out$"),
        ("none", "offload.workers=2", "use offload=cpu, or leave it out$"),
        ("gpu", "offload.workers=2", "use offload=cpu, or leave it out$"),
        ("none", "offload.payload=gradient", BOTH),
        ("none", "offload.base_gradients=true", BOTH),
        ("none", "offload.staleness=1", BOTH),
        ("none", "offload.wire_dtype=bfloat16", BOTH),
    ],
)
def test_a_setting_without_effect_is_refused(target, override, advice):
    key = override.partition("=")[0]
    message = rf"^{key}=\S+ has no effect with offload={target}: {advice}"
    with pytest.raises(ConfigError, match=message):
        check(override, base=(f"offload={target}",))


@pytest.mark.parametrize(
    ("target", "override"),
    [
        ("gpu", "offload.device=[cuda:1,cuda:2]"),
        ("cpu", "offload.workers=2"),
        ("cpu", "offload.payload=auto"),
        ("gpu", "offload.payload=gradient"),
        ("gpu", "offload.staleness=1"),
        ("cpu", "offload.wire_dtype=bfloat16"),
        ("none", "offload.drop_padding=false"),
    ],
)
def test_a_setting_with_effect_passes(target, override):
    check(override, base=(f"offload={target}",))


def test_a_value_of_a_file_is_not_refused():
    """Only what somebody asked for is an error: experiments may set what a row does not read."""
    validate(changed("offload.staleness=1", base=("offload=none",)), set())


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:x", "1"])
def test_a_device_that_is_no_gpu_is_refused(device):
    message = rf"^offload.device={device}: give GPUs as cuda:INDEX, one or a list; .*offload=cpu$"
    with pytest.raises(ConfigError, match=message):
        check(f"offload.device=['{device}']", base=("offload=gpu",))


def test_a_gpu_that_is_named_twice_is_refused():
    with pytest.raises(
        ConfigError, match=r"^offload.device=\[cuda:1, ?cuda:1\]: names a GPU twice"
    ):
        check("offload.device=[cuda:1,cuda:1]", base=("offload=gpu",))


@pytest.mark.parametrize("payload", ["factors", "gradient"])
def test_base_gradients_are_for_the_payload_that_chooses(payload):
    message = rf"^offload.base_gradients=true lets .* is {payload}: use auto, or leave it out$"
    with pytest.raises(ConfigError, match=message):
        check(
            "offload.base_gradients=true",
            f"offload.payload={payload}",
            base=("offload=cpu", "adapter=linear"),
        )


@pytest.mark.parametrize("payload", ["gradient", "auto"])
def test_gradients_of_users_are_formed_where_they_are_fitted(payload):
    message = rf"^offload.payload={payload} with users=alone: .* use offload.payload=factors, or "
    with pytest.raises(ConfigError, match=message):
        check(f"offload.payload={payload}", base=(*OF_USERS, "offload=cpu"))


def test_a_merged_gradient_needs_an_adapter_whose_gradient_needs_no_parameters():
    merged = ("offload=cpu", "merge=merged")
    message = r"^offload.payload=gradient with adapter=lowrank and merge=merged: .* use merge=unme"
    with pytest.raises(ConfigError, match=message):
        check("offload.payload=gradient", base=merged)
    check("offload.payload=gradient", base=(*merged, "adapter=linear"))
    check("offload.payload=gradient", base=("offload=cpu",))


# What the machine has


@pytest.fixture
def gpus(monkeypatch):
    """Says how many GPUs there are."""

    def have(num):
        monkeypatch.setattr(placing.torch.cuda, "device_count", lambda: num)

    return have


def resolve(base: torch.device, device: list[str] | None = None) -> tuple[torch.device, ...]:
    return resolve_offload(
        OffloadConfig(name=OffloadTarget.gpu, device=device), base, num_rows=1
    ).devices


@pytest.mark.parametrize(("base", "num"), [(CPU, 0), (CPU, 2), (FIRST_GPU, 1)])
def test_another_gpu_is_needed(gpus, base, num):
    gpus(num)
    message = (
        rf"base is on {base} and this machine has {num} GPUs: use offload=cpu or offload=none$"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(base)


def test_the_first_other_gpu_fits(gpus):
    gpus(3)
    assert resolve(FIRST_GPU) == (torch.device("cuda", 1),)
    assert resolve(torch.device("cuda", 1)) == (FIRST_GPU,)


def test_named_gpus_fit(gpus):
    gpus(3)
    assert resolve(FIRST_GPU, ["cuda:2", "cuda:1"]) == (
        torch.device("cuda", 2),
        torch.device("cuda", 1),
    )


@pytest.mark.parametrize("device", ["cuda:0", "cuda:3"])
def test_a_gpu_that_is_missing_or_taken_is_refused(gpus, device):
    gpus(3)
    message = rf"^offload.device={device}: give GPUs of this machine .*\(cuda:1, cuda:2\)$"
    with pytest.raises(ConfigError, match=message):
        resolve(FIRST_GPU, [device])


def test_the_wire_has_the_base_models_dtype_unless_asked():
    plain = resolve_offload(OffloadConfig(name=OffloadTarget.cpu), CPU, num_rows=1)
    narrow = resolve_offload(
        OffloadConfig(name=OffloadTarget.cpu, wire_dtype=WireDType.bfloat16), CPU, num_rows=1
    )
    assert (plain.wire_dtype, narrow.wire_dtype) == (None, torch.bfloat16)


def test_the_command_names_what_to_use_instead(gpus, capsys, tmp_path):
    gpus(0)
    arguments = ["offload=gpu", "device=cpu", "tracking=files", f"hydra.run.dir={tmp_path / 'run'}"]
    assert run_command(command.COMMAND, arguments) == BAD_CONFIG
    error = capsys.readouterr().err
    assert error.count("cola-train: ") == 1
    assert "this machine has 0 GPUs: use offload=cpu or offload=none" in error
    assert not (tmp_path / "run").exists()


def test_data_of_a_bfloat16_model_is_no_narrower_on_the_wire():
    base = ("task=synthetic", "model=tiny-gpt2", "model.dtype=bfloat16", "offload=cpu")
    with pytest.raises(ConfigError, match=r"travels in bfloat16 anyway; leave it out$"):
        check("offload.wire_dtype=bfloat16", base=base)
    check("offload.wire_dtype=bfloat16", base=(*base, "offload.payload=auto"))  # but its gradients
