"""Blocks of transformers, replayed: memory is overwritten as soon as it was released."""

from typing import Any

import pytest

import cola.offload.placing
from cola.config.choices import AdapterKind, DType, MergeMode
from cola.models import BaseModel, build_base_model
from tests import tiny
from tests.models import OBJECTIVES, filled, learner_of, model_of, text_problem, token_batches
from tests.rerun import Rerun
from tests.tolerances import FLOAT32
from tests.wires import LaggingTransfer

LAYERS = {
    "tiny-llama": {"num_hidden_layers": 4},
    "tiny-gpt2": {"n_layer": 4},
    "tiny-bart": {"encoder_layers": 3, "decoder_layers": 3},
    "tiny-roberta": {"num_hidden_layers": 4},
}


def built(name: str, **settings: Any) -> BaseModel:
    architecture: dict[str, Any] = {**model_of(name).architecture, **LAYERS[name]}
    objective = OBJECTIVES.get(name, "classification")
    config = model_of(name, architecture=architecture, **settings)
    return build_base_model(config, text_problem(objective), seed=0)


@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@pytest.mark.parametrize("name", LAYERS)
def test_replays_train_as_the_model_does(
    name: str, mode: MergeMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cola.offload.placing, "Transfer", LaggingTransfer)
    objective = OBJECTIVES.get(name, "classification")
    stream = token_batches(objective, 8)
    results = []
    for capturer in (None, Rerun()):
        base = built(name)
        start = filled(base, AdapterKind.lowrank)
        learner = learner_of(base, objective, start, mode, num_workers=2, capturer=capturer)
        losses = tiny.train(learner, stream)
        results.append((losses, learner.export()))
        learner.close()
    (wanted_losses, wanted), (losses, found) = results
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert tiny.distance(found, wanted, start) <= FLOAT32
    assert capturer is not None
    assert capturer.num_replays > 0


def test_blocks_of_llama_hold_nothing_for_the_block_after() -> None:
    """Its norms save float32, its sums nothing: in bfloat16 what a block answers is soon free."""
    capturer = Rerun()
    base = built("tiny-llama", dtype=DType.bfloat16)
    learner = learner_of(base, "causal", filled(base, AdapterKind.lowrank), capturer=capturer)
    tiny.train(learner, [token_batches("causal", 1)[0]] * 3)
    learner.close()
    assert (
        sum(since <= 4 for since, _ in capturer.released) == 2 * 2
    )  # of two blocks: who wrote, who read
