"""`offload.wire_dtype=bfloat16` on a float32 base: how far its gradients are from autograd's."""

import functools

import pytest
import torch

from cola.cli import verify as command
from cola.cli.app import run_command
from cola.cli.outcome import FAILED
from cola.config.choices import AdapterKind
from cola.gradient_wiring import build_gradient_learner
from cola.offload.placing import OffloadPlan
from cola.verify import run_checks
from tests import tiny
from tests.runs import config_of
from tests.tolerances import BFLOAT16, FLOAT32

FLOAT = torch.float32
ON_WIRE = ("task=digits", "offload=cpu", "offload.wire_dtype=bfloat16")


@functools.cache
def relative_errors(kind: AdapterKind, wire_dtype: torch.dtype | None) -> dict[str, float]:
    """Of every site's gradient on one batch, against plain back-propagation in float32."""
    base = tiny.net(dtype=FLOAT)
    (batch,) = tiny.batches(base, 1, dtype=FLOAT)
    oracle = tiny.oracle_learner(tiny.net(dtype=FLOAT), tiny.filled_adapters(base, kind))
    learner = build_gradient_learner(
        base, tiny.specs(base), tiny.filled_adapters(base, kind), settings_of(wire_dtype)
    )
    for one in (oracle, learner):
        one.record(batch, None)
    wanted, found = oracle.export(), learner.export()
    learner.close()
    return {
        site: float((tiny.flat_gradient(found[site]) - true).norm() / true.norm())
        for site in wanted
        for true in [tiny.flat_gradient(wanted[site])]
    }


def settings_of(wire_dtype: torch.dtype | None) -> tiny.GradientLearning:
    plan = OffloadPlan(devices=(torch.device("cpu"),), workers=1, wire_dtype=wire_dtype)
    return tiny.settings(offload=plan)


@pytest.mark.parametrize("kind", AdapterKind, ids=lambda kind: kind.name)
def test_a_narrow_wire_costs_a_rounding_to_bfloat16(kind: AdapterKind) -> None:
    errors = relative_errors(kind, torch.bfloat16)
    assert len(errors) == 5
    assert all(FLOAT32 < error <= BFLOAT16 for error in errors.values()), errors
    plain = relative_errors(kind, None)
    assert all(error <= FLOAT32 for error in plain.values()), plain


def test_a_narrow_wire_carries_half_of_the_bytes() -> None:
    sent = {}
    for wire_dtype in (None, torch.bfloat16):
        base = tiny.net(dtype=FLOAT)
        adapters = tiny.filled_adapters(base, AdapterKind.linear)
        learner = build_gradient_learner(base, tiny.specs(base), adapters, settings_of(wire_dtype))
        returned = sum(p.nbytes for adapter in adapters.values() for p in adapter.parameters())
        learner.record(tiny.batches(base, 1, dtype=FLOAT)[0], None)
        sent[wire_dtype] = learner.measure().wire_bytes - returned
        learner.close()
    assert sent[None] == 2 * sent[torch.bfloat16] > 0


def test_verify_measures_the_rounding_and_calls_it_a_difference() -> None:
    *sites, merged = run_checks(config_of(*ON_WIRE))
    assert [check.name for check in sites] == ["linear1", "linear2", "linear3"]
    assert all(1e-4 < check.error <= BFLOAT16 for check in sites)
    assert not any(check.holds for check in sites)
    assert merged.holds  # nothing travels where the logits are compared


def test_verify_exits_by_that_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command.COMMAND, [*ON_WIRE, "device=cpu"]) == FAILED
    assert capsys.readouterr().out.count("DIFFERS") == 3
