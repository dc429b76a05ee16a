"""Rows of padding: their hidden gradients are zero, and which rows may therefore stay behind."""

import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import Adapter
from cola.config.choices import AdapterKind, MergeMode, Objective, Reduction
from cola.gradient_settings import GradientLearning
from cola.gradient_wiring import build_gradient_learner
from cola.kept_rows import KeptRows, keep_rows
from cola.models import BaseModel, build_base_model
from cola.models.row_streams import with_streams
from cola.objectives import task_loss
from cola.offload.placing import OffloadPlan
from cola.row_dropping import RowDropping
from cola.sites import RowStream, SiteName, SiteSpec, describe_site
from cola.task_data import Batch, Example
from cola.tasks.collate import CausalCollator, PairCollator, TextCollator
from cola.user_rows import UserRows
from tests import tiny
from tests.models import filled, model_of, text_problem
from tests.tiny import Output

CPU = torch.device("cpu")
PAD, END = 0, 3
LENGTHS = [5, 9, 2]
TARGETS = [2, 3, 6]

BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": PAD,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}


class Case(NamedTuple):
    """A base model with every layer tapped, for one objective."""

    model: str
    objective: str
    architecture: dict[str, Any] | None = None


CASES = {
    "roberta": Case("tiny-roberta", "classification"),
    "bert": Case("tiny-roberta", "classification", BERT),
    "gpt2": Case("tiny-gpt2", "causal"),
    "gpt2-classifier": Case("tiny-gpt2", "classification"),
    "llama": Case("tiny-llama", "causal"),
    "bart": Case("tiny-bart", "seq2seq"),
    "bart-classifier": Case("tiny-bart", "classification"),
    "t5": Case("tiny-bart", "seq2seq", T5),
    "t5-classifier": Case("tiny-bart", "classification", T5),
}


HEADS = {"score", "classifier", "classifier.dense", "classifier.out_proj", "bert.pooler.dense"}


@functools.cache
def built(name: str) -> BaseModel:
    model, objective, architecture = CASES[name]
    settings = {} if architecture is None else {"architecture": architecture}
    return build_base_model(
        model_of(model, sites=["all"], **settings), text_problem(objective), seed=0
    )


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[BaseModel, Objective]:
    return built(request.param), Objective[CASES[request.param].objective]


def words(lengths: Sequence[int]) -> list[Tensor]:
    """Rows that end in the end token, with different words."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(4, 50, (length,), generator=generator) for length in lengths]
    return [torch.cat([row[:-1], torch.tensor([END])]) for row in ids]


def collated(objective: Objective, *, length: int | None = None) -> Batch:
    """Rows of uneven lengths, padded by the collator that the objective has."""
    ids, targets = words(LENGTHS), words(TARGETS)
    rows: list[Example]
    if objective is Objective.causal:
        rows = [{"input_ids": row, "labels": row} for row in ids]
        return CausalCollator(pad_id=PAD, length=length)(rows)
    if objective is Objective.seq2seq:
        rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, targets, strict=True)]
        return PairCollator(pad_id=PAD, start_id=END, length=length)(rows)
    rows = [{"input_ids": row, "label": number % 2} for number, row in enumerate(ids)]
    collator = TextCollator(pad_id=PAD, pad_type_id=0, length=length, label_dtype=torch.long)
    return collator(rows)


class Call(NamedTuple):
    """One call of a site: shape of its hidden input, and its hidden gradient."""

    site: SiteName
    shape: torch.Size
    gradient: Tensor


def calls(
    module: nn.Module, sites: Sequence[SiteName], objective: Objective, batch: Batch
) -> list[Call]:
    """What every site shows in one forward and backward pass."""
    module.requires_grad_(True)
    seen: list[Call] = []
    handles = []
    for site in sites:

        def hook(_: Any, inputs: tuple[Tensor, ...], hidden: Tensor, site: str = site) -> None:
            shape = inputs[0].shape
            hidden.register_hook(lambda gradient: seen.append(Call(site, shape, gradient)))

        handles.append(module.get_submodule(site).register_forward_hook(hook))
    task_loss(objective, module(**batch.inputs).logits, batch).backward()
    for handle in handles:
        handle.remove()
    return seen


def look(dropping: RowDropping, batch: Batch, seen: Sequence[Call]) -> dict[SiteName, KeptRows]:
    """One recorded step."""
    kept = dropping.begin(batch)
    for call in seen:
        dropping.check(*call)
    dropping.settle()
    return kept


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "dtype"),
    # transformers' eager Llama overflows in float64 at tokens that see nothing (left padding).
    [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.float64)],
)
@pytest.mark.parametrize("length", [None, 12])
def test_gradients_at_padding_are_exactly_zero(
    case: tuple[BaseModel, Objective], attention: str, dtype: torch.dtype, length: int | None
) -> None:
    base, objective = case
    module: Any = base.module.to(dtype)
    module.set_attn_implementation(attention)
    batch = collated(objective, length=length)
    seen = calls(module, list(base.sites), objective, batch)
    fitting = set()
    for site, shape, gradient in seen:
        mask = batch.row_masks.get(base.sites[site].stream)
        if mask is None or shape[:2] != mask.shape:
            continue
        fitting.add(site)
        assert gradient[~mask].eq(0).all(), site
        assert gradient[mask].ne(0).any(), site
    # Nothing but heads and a pooler works on other rows than tokens.
    assert not any(base.sites[site].is_head for site in fitting)
    assert all("head" in site or site in HEADS for site in base.sites.keys() - fitting)
    dropping = RowDropping(base.sites, CPU, enabled=True)
    assert look(dropping, batch, seen) == {}  # the first batch travels whole
    assert look(dropping, batch, seen).keys() == fitting


def test_decoder_of_a_writing_model_reads_its_own_rows_but_for_cross_attention() -> None:
    for name, keys, others in [
        ("bart", ("encoder_attn.k_proj", "encoder_attn.v_proj"), ("encoder_attn.q_proj", "fc1")),
        ("t5", ("EncDecAttention.k", "EncDecAttention.v"), ("EncDecAttention.o", "wo")),
    ]:
        sites = built(name).sites
        encoder = {site: spec.stream for site, spec in sites.items() if "encoder." in site}
        decoder = {site: spec.stream for site, spec in sites.items() if "decoder." in site}
        assert set(encoder.values()) == {RowStream.inputs}
        for part in keys:
            assert {decoder[site] for site in decoder if site.endswith(part)} == {RowStream.inputs}
        for part in others:
            assert {decoder[site] for site in decoder if site.endswith(part)} == {RowStream.targets}
        assert encoder.keys() | decoder.keys() == sites.keys()


class Writer(nn.Module):
    """An encoder-decoder whose cross-attention has names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"dense": nn.Linear(2, 2)})
        self.decoder = nn.ModuleDict({"cross_attn": nn.ModuleDict({"both": nn.Linear(2, 2)})})
        self.bridge = nn.Linear(2, 2)

    def get_encoder(self) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder


def test_rows_of_an_unknown_site_all_travel() -> None:
    writer = Writer()
    names = ["encoder.dense", "decoder.cross_attn.both", "bridge"]
    sites = {name: describe_site(name, writer.get_submodule(name)) for name in names}
    found = with_streams(sites, writer, text_problem("seq2seq"))
    streams = [found[name].stream for name in names]
    assert streams == [RowStream.inputs, RowStream.whole, RowStream.whole]


def trained(
    base: BaseModel, objective: Objective, *, drops: bool
) -> tuple[dict[SiteName, Adapter], int]:
    """Adapters after three steps beside the base model's pass, and the bytes that travelled."""
    settings = GradientLearning(
        objective=objective,
        scale=tiny.SCALE,
        mode=MergeMode.unmerged,
        optimizer=tiny.optimizer(),
        reduction=Reduction.mean,
        offload=OffloadPlan(devices=(CPU,), workers=1, drops_padding=drops),
    )
    adapters = filled(base, AdapterKind.lowrank)
    learner = build_gradient_learner(base.module, base.sites, adapters, settings)
    tiny.train(learner, [collated(objective)] * 3)
    result = copy.deepcopy(dict(learner.export()))
    num_bytes = learner.measure().wire_bytes
    learner.close()
    return result, num_bytes


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_adapters_learn_the_same_from_less(name: str) -> None:
    base, objective = built(name), Objective[CASES[name].objective]
    module: Any = base.module.to(torch.float64)
    module.set_attn_implementation("sdpa")
    start = filled(base, AdapterKind.lowrank)
    wanted, all_bytes = trained(base, objective, drops=False)
    found, num_bytes = trained(base, objective, drops=True)
    assert tiny.distance(found, wanted, start) < 1e-10
    assert num_bytes < 0.85 * all_bytes  # the first of three steps is whole


# Which rows --------------------------------------------------------------------------------------


def mask_of(lengths: Sequence[int], length: int = 10) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def test_kept_rows_are_the_real_tokens() -> None:
    mask = mask_of([3, 10, 1])
    kept = keep_rows(mask, None, CPU)
    assert kept is not None
    tensor = torch.randn(3, 10, 4)
    assert torch.equal(kept.take(tensor), tensor[mask])
    assert torch.equal(kept.take(tensor.flatten(0, 1)), tensor[mask])
    assert torch.equal(kept.take(kept.take(tensor)), tensor[mask])
    assert kept.applies_to(tensor.shape)
    assert not kept.applies_to(tensor.flatten(0, 1).shape)  # (N, D) says nothing of B and T
    assert not kept.applies_to(tensor[:, 0].shape)
    assert not kept.applies_to(tensor.transpose(0, 1).shape)
    assert not kept.applies_to(tensor[..., None].shape)


@pytest.mark.parametrize("spoilt", [1.0, float("nan"), -1e-38])
def test_every_dropped_row_is_looked_at(spoilt: float) -> None:
    mask = mask_of([3, 9, 1])
    kept = keep_rows(mask, None, CPU)
    assert kept is not None
    gradient = torch.randn(3, 10, 4) * mask[..., None]
    assert kept.is_zero_elsewhere(gradient)
    for row, token in (~mask).nonzero().tolist():
        broken = gradient.clone()
        broken[row, token, 2] = spoilt
        assert not kept.is_zero_elsewhere(broken)
        assert not kept.is_zero_elsewhere(broken.flatten(0, 1))


@pytest.mark.parametrize("lengths", [[10, 10], [10, 9], [10, 0]])
def test_all_rows_travel_where_dropping_does_not_pay_or_would_leave_none(
    lengths: list[int],
) -> None:
    assert keep_rows(mask_of(lengths), None, CPU) is None
    assert keep_rows(mask_of([10, 8]), None, CPU) is not None


def test_users_keep_their_own_rows() -> None:
    rows = UserRows(users=(0, 3, 4), counts=(2, 1, 2))
    kept = keep_rows(mask_of([1, 2, 7, 3, 10]), rows, CPU)
    assert kept is not None
    assert kept.rows == UserRows(users=(0, 3, 4), counts=(3, 7, 13))
    owners = torch.tensor([0, 0, 3, 4, 4])[:, None, None].expand(-1, 10, 1)
    for user, where in kept.rows.slices():
        assert set(kept.take(owners)[where].flatten().tolist()) == {user}
    assert kept.rows.spread(len(kept.index)) == kept.rows


def test_users_that_take_no_part_take_their_masks_along() -> None:
    batch = collated(Objective.seq2seq)
    batch = dataclasses.replace(batch, rows=UserRows.of([0, 1, 2])).to(CPU)
    left = batch.without(frozenset({1}))
    for stream in (RowStream.inputs, RowStream.targets):
        assert left.row_masks[stream].tolist() == batch.row_masks[stream][[0, 2]].tolist()
    lengths = left.inputs["attention_mask"].sum(dim=1)
    assert torch.equal(left.row_masks[RowStream.inputs].sum(dim=1), lengths)


# The decision ------------------------------------------------------------------------------------


class Pool(nn.Module):
    """A classifier that averages over tokens, with or without a look at the mask."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.masked = masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        x = self.first(self.words(input_ids))
        # What `second` makes of padding is never used, what `first` does is.
        y = self.second(x) * attention_mask[..., None]
        x = x * attention_mask[..., None] if self.masked else x
        return Output(self.head((x + y).mean(dim=1)))


def pool_step(*, masked: bool) -> tuple[dict[SiteName, SiteSpec], Batch, list[Call]]:
    torch.manual_seed(0)
    module = Pool(masked=masked)
    sites = {
        name: dataclasses.replace(
            describe_site(name, module.get_submodule(name)), stream=RowStream.inputs
        )
        for name in ("first", "second", "head")
    }
    batch = collated(Objective.classification)
    return sites, batch, calls(module, list(sites), Objective.classification, batch)


def test_a_base_model_that_mixes_padding_in_keeps_all_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sites, batch, seen = pool_step(masked=False)
    dropping = RowDropping(sites, CPU, enabled=True)
    for _ in range(3):
        assert look(dropping, batch, seen) == {}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "site 'first', 1 of 2" in warning.getMessage()
    assert "all rows travel" in warning.getMessage()


def test_rows_are_dropped_after_one_look(caplog: pytest.LogCaptureFixture) -> None:
    sites, batch, seen = pool_step(masked=True)
    dropping = RowDropping(sites, CPU, enabled=True)
    assert look(dropping, batch, seen) == {}
    kept = look(dropping, batch, seen)
    assert kept.keys() == {"first", "second"}  # the head has one row of each text
    mask = batch.row_masks[RowStream.inputs]
    assert torch.equal(kept["first"].index, mask.flatten().nonzero().flatten())
    assert not caplog.records


def test_a_batch_without_padding_decides_nothing() -> None:
    sites, batch, seen = pool_step(masked=True)
    full = {RowStream.inputs: torch.ones(3, 9, dtype=torch.bool)}
    dropping = RowDropping(sites, CPU, enabled=True)
    assert look(dropping, dataclasses.replace(batch, row_masks=full), seen) == {}
    assert look(dropping, batch, seen) == {}
    assert look(dropping, dataclasses.replace(batch, row_masks=full), seen) == {}
    assert look(dropping, batch, seen) != {}


def test_zeros_everywhere_prove_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sites, batch, seen = pool_step(masked=False)
    dropping = RowDropping(sites, CPU, enabled=True)
    untaught = [call._replace(gradient=torch.zeros_like(call.gradient)) for call in seen]
    assert look(dropping, batch, untaught) == {}
    assert look(dropping, batch, seen) == {}
    assert look(dropping, batch, seen) == {}
    assert "all rows travel" in caplog.text


def test_a_site_that_also_works_on_other_rows_keeps_them_all() -> None:
    """With as many tokens as the text by chance, those would be taken for its own."""
    sites, batch, seen = pool_step(masked=True)
    other = Call("first", torch.Size([3, 5, 4]), torch.randn(3, 5, 4))
    dropping = RowDropping(sites, CPU, enabled=True)
    assert look(dropping, batch, [*seen, other]) == {}
    assert look(dropping, batch, seen).keys() == {"second"}


def test_switched_off_nothing_is_dropped_or_looked_at() -> None:
    sites, batch, seen = pool_step(masked=True)
    dropping = RowDropping(sites, CPU, enabled=False)
    assert look(dropping, batch, seen) == look(dropping, batch, seen) == {}
    decided = RowDropping(sites, CPU, enabled=True)
    look(decided, batch, seen)
    dropping.load_state_dict(decided.state_dict())  # a run that goes on with the key switched off
    assert dropping.begin(batch) == {}


@pytest.mark.parametrize("masked", [False, True])
def test_a_resumed_run_keeps_to_the_decision(
    masked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sites, batch, seen = pool_step(masked=masked)
    dropping = RowDropping(sites, CPU, enabled=True)
    look(dropping, batch, seen)
    resumed = RowDropping(sites, CPU, enabled=True)
    resumed.load_state_dict(json.loads(json.dumps(dropping.state_dict())))
    caplog.clear()
    assert look(resumed, batch, seen).keys() == look(dropping, batch, seen).keys()
    assert bool(resumed.begin(batch)) is masked
    assert not caplog.records
