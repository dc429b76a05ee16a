"""Gradients of many users: every route to them gives the same, whoever has how many rows."""

import pytest
import torch

from cola import user_gradients as routes
from cola.adaptation_data import AdaptationData
from cola.config.choices import AdapterKind
from cola.user_rows import UserRows
from cola.user_stack import UserStack
from tests import tiny
from tests.tolerances import EXACT

NUM_USERS = 4
EVERYONE = tuple(range(NUM_USERS))
ROWS = {
    "uneven": UserRows(users=EVERYONE, counts=(3, 1, 7, 2)),
    "even": UserRows(users=EVERYONE, counts=(3,) * NUM_USERS),
    "some": UserRows(users=(1, 3), counts=(4, 5)),
    "some, even": UserRows(users=(0, 2), counts=(4, 4)),
    "one": UserRows(users=(2,), counts=(6,)),
}
by_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def build(kind: AdapterKind, rows: UserRows) -> tuple[UserStack, AdaptationData]:
    spec = tiny.site("linear").spec
    members = [tiny.filled_adapter(kind, spec, seed=user) for user in range(NUM_USERS)]
    stack = UserStack(members, first=0, alphas=[1.0, 0.5, 2.0, -1.0]).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    x, g = (
        torch.randn(rows.total, size, generator=generator, dtype=torch.float64)
        for size in (spec.in_features, spec.out_features)
    )
    return stack, AdaptationData(hidden_input=x, hidden_gradient=g)


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    assert list(found) == list(wanted)
    return all((found[name] - wanted[name]).abs().max() <= EXACT for name in wanted)


@pytest.mark.parametrize("long", [0, 1 << 20], ids=["long", "short"])
@pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda kind: kind.name)
@by_rows
def test_every_user_gets_what_its_rows_alone_make(
    monkeypatch: pytest.MonkeyPatch, rows: UserRows, kind: AdapterKind, long: int
) -> None:
    monkeypatch.setattr(routes, "LONG", long)
    stack, data = build(kind, rows)
    (found,) = routes.user_gradients([stack], data.hidden_input, [data.hidden_gradient], rows)
    assert agree(found, routes._member_gradients(stack, data, rows))
    for gradient in found.values():
        assert gradient.is_contiguous() or kind is AdapterKind.mlp
        assert {user for user in EVERYONE if gradient[user].any()} == set(rows.users)


@by_rows
def test_tiles_of_mlps_make_the_same(rows: UserRows) -> None:
    """Which a GPU takes whatever the rows."""
    stack, data = build(AdapterKind.mlp, rows)
    tiles = rows.tiles(NUM_USERS, torch.device("cpu"))
    x, g = tiles.cut(data.hidden_input), tiles.cut(data.hidden_gradient, fill=0.0)
    found = routes._surrogate_gradients(stack, x, g, rows)
    assert agree(found, routes._member_gradients(stack, data, rows))


def test_a_host_cuts_no_long_rows_into_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS["uneven"]
    tiles = rows.tiles(NUM_USERS, torch.device("cpu"))
    cut: list[torch.Tensor] = []
    monkeypatch.setattr(type(tiles), "cut", lambda self, rows, fill=None: cut.append(rows))
    monkeypatch.setattr(routes, "LONG", 0)
    for kind in AdapterKind:
        stack, data = build(kind, rows)
        routes.user_gradients([stack], data.hidden_input, [data.hidden_gradient], rows)
    assert not cut
