"""Models that write: encoder-decoders and a Llama against autograd, losses, families, T5."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cola.adapters import Adapter
from cola.autograd_learner import AutogradLearner
from cola.config.choices import AdapterKind, DType, Family, MergeMode, Objective, Reduction
from cola.errors import ConfigError
from cola.experiment import build_problem
from cola.gradient_learner import set_training_mode
from cola.models import BaseModel, build_base_model, resolve_family
from cola.objectives import IGNORED, task_loss
from cola.oracle import attach_trainable
from cola.sites import SiteName
from cola.task_data import Batch
from tests import tiny
from tests.configs import composed
from tests.models import OBJECTIVES, filled, learner_of, model_of, text_problem, token_batches
from tests.tolerances import EXACT

NETS = ["tiny-bart", "tiny-llama"]
NUM_STEPS = 3

# Gradient learning -------------------------------------------------------------------------------


def double(name: str, **settings: Any) -> BaseModel:
    model = model_of(name, dtype=DType.float64, **settings)
    return build_base_model(model, text_problem(OBJECTIVES[name]), seed=0)


@functools.cache
def truth(name: str, kind: AdapterKind) -> tuple[dict[SiteName, Adapter], list[float]]:
    base = double(name)
    own = filled(base, kind)
    parameters, _ = attach_trainable(base.module, own, scale=tiny.SCALE)
    oracle = AutogradLearner(
        base.module,
        parameters,
        objective=Objective[OBJECTIVES[name]],
        optimizer=tiny.optimizer(),
        reduction=Reduction.mean,
        set_training_mode=set_training_mode,
    )
    return own, tiny.train(oracle, token_batches(OBJECTIVES[name], NUM_STEPS), interval=2)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (AdapterKind.lowrank, MergeMode.unmerged),
        (AdapterKind.linear, MergeMode.merged),
        (AdapterKind.mlp, MergeMode.unmerged),
    ],
)
@pytest.mark.parametrize("name", NETS)
def test_weights_equal_autograd(
    name: str, kind: AdapterKind, mode: MergeMode, checkpoints: bool
) -> None:
    wanted, losses = truth(name, kind)
    base = double(name, gradient_checkpointing=checkpoints)
    start = filled(base, kind)
    learner = learner_of(base, OBJECTIVES[name], start, mode, num_workers=2)
    found = tiny.train(learner, token_batches(OBJECTIVES[name], NUM_STEPS), interval=2)
    assert tiny.distance(learner.export(), wanted, start) <= EXACT
    assert found == pytest.approx(losses, rel=EXACT)
    learner.close()


# Losses ------------------------------------------------------------------------------------------


def test_loss_of_an_encoder_decoder_is_that_of_the_library() -> None:
    base = build_base_model(model_of("tiny-bart"), text_problem("seq2seq"), seed=0)
    (batch,) = token_batches("seq2seq", 1)
    output = base.module(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(task_loss(Objective.seq2seq, output.logits, batch), output.loss)


def test_loss_scores_the_first_label_and_no_ignored_one() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORED, IGNORED], [2, 3, IGNORED]])
    found = task_loss(Objective.seq2seq, logits, Batch(inputs={}, labels=labels, num_terms=3))
    rows, positions = [0, 1, 1], [0, 0, 1]
    scored = functional.cross_entropy(logits[rows, positions], torch.tensor([1, 2, 3]))
    torch.testing.assert_close(found, scored)


def test_loss_of_bfloat16_logits_is_float32() -> None:
    logits = torch.zeros(2, 3, 5, dtype=torch.bfloat16)
    batch = Batch(inputs={}, labels=torch.ones(2, 3, dtype=torch.long), num_terms=6)
    for objective in (Objective.seq2seq, Objective.causal):
        assert task_loss(objective, logits, batch).dtype is torch.float32


def test_cross_attention_sites_see_the_encoder() -> None:
    base = double("tiny-bart", sites=["encoder_attn.v_proj"])
    (batch,) = token_batches("seq2seq", 1)
    seen: list[Tensor] = []
    for site in base.sites:
        base.module.get_submodule(site).register_forward_hook(
            lambda _m, args, _h: seen.append(args)
        )
    encoder = base.module.model.encoder
    with torch.no_grad():
        base.module(**batch.inputs)
        wanted = encoder(batch.inputs["input_ids"], batch.inputs["attention_mask"])
    assert len(seen) == 2
    assert all(torch.equal(args[0], wanted.last_hidden_state) for args in seen)


# Families and folders ----------------------------------------------------------------------------

T5 = {
    "model_type": "t5",
    "vocab_size": None,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
M2M = {
    "model_type": "m2m_100",
    "vocab_size": None,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "encoder_layerdrop": 0.9,  # is ignored, or sites would not run
    "decoder_layerdrop": 0.9,
    "pad_token_id": 0,
    "bos_token_id": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoder-decoders, a Llama and an encoder saved as pretrained models would be."""
    models = {
        "t5": model_of("tiny-bart", sites=["q"], architecture=T5),
        "m2m": model_of("tiny-bart", architecture=M2M),
        "llama": model_of("tiny-llama"),
        "roberta": model_of("tiny-roberta"),
    }
    objectives = {"llama": "causal", "roberta": "classification"}
    result = {}
    for name, model in models.items():
        problem = text_problem(objectives.get(name, "seq2seq"))
        base = build_base_model(model, problem, seed=7)
        result[name] = tmp_path_factory.mktemp(name)
        assert base.tokenizer is not None
        for part in (base.module, base.tokenizer):
            part.save_pretrained(result[name])
    return result


@pytest.mark.parametrize(
    ("name", "family"),
    [("t5", "seq2seq"), ("m2m", "seq2seq"), ("llama", "decoder"), ("roberta", "encoder")],
)
def test_family_is_what_the_files_say(folders: dict[str, Path], name: str, family: str) -> None:
    model = model_of("hf", path=str(folders[name]))
    assert resolve_family(model) is resolve_family(model, on_meta=True) is Family[family]


@pytest.mark.parametrize(
    ("name", "objective"), [("t5", "seq2seq"), ("llama", "causal"), ("roberta", "classification")]
)
def test_open_task_is_posed_by_the_files(
    folders: dict[str, Path], name: str, objective: str
) -> None:
    config = composed("task=synthetic", "model=hf", f"model.path={folders[name]}").config
    assert build_problem(config).objective is Objective[objective]


@pytest.mark.parametrize("task", ["task=glue", "task.objective=causal"])
def test_task_that_leaves_nothing_open_reads_no_files(task: str) -> None:
    config = composed("task=synthetic", task, "model=hf", "model.path=/no/such").config
    wanted = "classification" if task == "task=glue" else "causal"
    assert build_problem(config).objective is Objective[wanted]


def test_family_that_is_stated_is_not_looked_up() -> None:
    assert resolve_family(model_of("hf", path="/no/such", family=Family.encoder)) is Family.encoder
    assert resolve_family(model_of("mlp")) is None


@pytest.mark.parametrize(
    ("name", "sites", "start"), [("t5", ["q", "v", "wi"], 0), ("m2m", ["q_proj", "fc1"], 2)]
)
def test_encoder_decoder_of_a_folder_is_exact(
    folders: dict[str, Path], name: str, sites: list[str], start: int
) -> None:
    model = model_of("hf", path=str(folders[name]), sites=sites, dtype=DType.float64)
    base = build_base_model(model, text_problem("seq2seq"), seed=0)
    assert not base.new_parameters
    assert base.decoder_start_id == start
    (batch,) = token_batches("seq2seq", 1)
    own = filled(base, AdapterKind.lowrank)
    learner = learner_of(base, "seq2seq", own)
    learner.record(batch, None)
    found = {site: tiny.flat_gradient(adapter) for site, adapter in learner.export().items()}
    learner.close()
    attach_trainable(base.module, own, scale=tiny.SCALE)
    task_loss(Objective.seq2seq, base.module(**batch.inputs).logits, batch).backward()
    for site, adapter in own.items():
        torch.testing.assert_close(found[site], tiny.flat_gradient(adapter), rtol=EXACT, atol=EXACT)


def test_default_sites_of_t5_are_its_attention(folders: dict[str, Path]) -> None:
    model = model_of("hf", path=str(folders["t5"]))
    base = build_base_model(model, text_problem("seq2seq"), seed=0, on_meta=True)
    assert len(base.sites) == 6  # q and v: encoder, decoder, across
    assert base.decoder_start_id == 0


def test_missing_weights_of_a_t5_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in folders["t5"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(ConfigError, match=r"the weights do not fit config\.json"):
        build_base_model(model_of("hf", path=str(tmp_path)), text_problem("seq2seq"), seed=0)


def test_decoder_start_falls_back_to_the_beginning_or_is_asked_for() -> None:
    for start, bos, wanted in ((3, 2, 3), (None, 2, 2)):
        architecture = {**M2M, "decoder_start_token_id": start, "bos_token_id": bos}
        model = model_of("tiny-bart", architecture=architecture)
        base = build_base_model(model, text_problem("seq2seq"), seed=0, on_meta=True)
        assert base.decoder_start_id == wanted
    architecture = {**M2M, "decoder_start_token_id": None, "bos_token_id": None}
    model = model_of("tiny-bart", architecture=architecture)
    with pytest.raises(ConfigError, match="no token for its decoder to start from; set decoder_st"):
        build_base_model(model, text_problem("seq2seq"), seed=0, on_meta=True)


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("tiny-bart", "causal", "tiny-bart is no decoder.*choose a decoder"),
        ("tiny-llama", "seq2seq", "tiny-llama is no encoder-decoder.*hf with one such as T5"),
        ("tiny-roberta", "seq2seq", "tiny-roberta is no encoder-decoder"),
    ],
)
def test_model_of_another_family_is_refused(name: str, objective: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_base_model(model_of(name), text_problem(objective), seed=0, on_meta=True)


def test_folder_of_another_family_is_refused(folders: dict[str, Path]) -> None:
    for name, objective in (("t5", "causal"), ("llama", "seq2seq"), ("roberta", "seq2seq")):
        model = model_of("hf", path=str(folders[name]))
        with pytest.raises(ConfigError, match=r"is no (decoder|encoder-decoder), but the task"):
            build_base_model(model, text_problem(objective), seed=0)


@pytest.mark.parametrize("name", ["tiny-bart", "tiny-llama", "tiny-gpt2"])
def test_models_that_write_can_classify(name: str) -> None:
    base = build_base_model(model_of(name), text_problem(num_labels=3), seed=0)
    assert base.tokenizer is not None
    assert base.decoder_start_id is None
    assert [spec.is_head for spec in base.sites.values()][-1]
    rows = base.tokenizer(["the fox", "a bear by the drill"], padding=True, return_tensors="pt")
    both = base.module(**rows).logits
    assert both.shape == (2, 3)
    alone = base.module(**base.tokenizer(["the fox"], return_tensors="pt")).logits
    torch.testing.assert_close(alone, both[:1])


def test_tiny_llama_shares_keys_and_values_among_heads() -> None:
    base = build_base_model(model_of("tiny-llama"), text_problem("causal"), seed=0, on_meta=True)
    sizes = {name.rpartition(".")[2]: spec.out_features for name, spec in base.sites.items()}
    assert sizes == {"q_proj": 64, "v_proj": 32}
