"""Generated text: the model's own next tokens, whatever the cache, the batch and the merge."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import build_adapter
from cola.config.choices import AdapterKind, DType, MergeMode, Objective, Reduction
from cola.config.schema import AdapterConfig, GenerationConfig
from cola.config.validation import validate
from cola.errors import ConfigError
from cola.generation import Decoding, check_positions, generate_texts, resolve_decoding
from cola.gradient_settings import GradientLearning
from cola.gradient_wiring import build_gradient_learner
from cola.models import BaseModel, build_base_model
from cola.task_data import Problem, Split, TaskData
from cola.tasks.collate import build_prompt_collator
from cola.user_rows import UserRows
from tests import tiny
from tests.configs import changed
from tests.models import OBJECTIVES, model_of, text_problem
from tests.tiny import optimizer

CPU = torch.device("cpu")
GREEDY = GenerationConfig(max_new_tokens=5, num_beams=1, no_repeat_ngram=0, batch_size=3)
SEARCH = GenerationConfig(max_new_tokens=5, num_beams=3, no_repeat_ngram=2, batch_size=3)
LENGTHS = (5, 2, 7, 1)


class Subject:
    """A float64 model with adapters that say something, its task, and prompts of many lengths."""

    def __init__(self, name: str) -> None:
        self.name = name
        problem = text_problem(OBJECTIVES[name])
        self.base: BaseModel = build_base_model(
            model_of(name, dtype=DType.float64), problem, seed=0
        )
        self.task = task_of(problem, self.base.tokenizer)
        generator = torch.Generator().manual_seed(0)
        self.rows = [
            {"prompt_ids": torch.randint(4, 50, (length,), generator=generator)}
            for length in LENGTHS
        ]
        config = AdapterConfig(kind=AdapterKind.lowrank, rank=4)
        self.adapters = {}
        for site, spec in self.base.sites.items():
            adapter = build_adapter(config, spec, seed=0)
            for parameter in adapter.parameters():
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            self.adapters[site] = adapter

    def write(
        self, config: GenerationConfig, rows: Any = None, mode: MergeMode = MergeMode.unmerged
    ) -> list[str]:
        learner = self.learner(mode)
        with learner.evaluating() as model:
            found = generate_texts(model, rows or self.rows, self.task, config, CPU)
        learner.close()
        return found.texts

    def learner(self, mode: MergeMode) -> Any:
        return build_gradient_learner(
            self.base.module,
            self.base.sites,
            copy.deepcopy(self.adapters),
            GradientLearning(
                objective=self.task.problem.objective,
                scale=1.0,
                mode=mode,
                optimizer=optimizer(),
                reduction=Reduction.mean,
                offload=tiny.offload_plan(0),
            ),
        )


def task_of(problem: Problem, tokenizer: Any) -> TaskData:
    nothing = Split(name="none", rows=[])
    return TaskData(
        name="prompts",
        problem=problem,
        train=nothing,
        selection=nothing,
        report=nothing,
        collate=lambda rows: pytest.fail("generation reads prompts alone"),
        score=lambda **_: {},
        collate_prompts=build_prompt_collator(problem.objective, tokenizer),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama", "tiny-bart"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@torch.no_grad()
def slow_text(subject: Subject, model: nn.Module, prompt: Tensor) -> str:
    """Greedy search with a whole forward pass for every token: no cache, no padding, no library."""
    is_seq2seq = subject.task.problem.objective is Objective.seq2seq
    written = [subject.base.decoder_start_id] if is_seq2seq else prompt.tolist()
    start = len(written)
    for _ in range(5):
        ids = torch.tensor([written])
        inputs = (
            {"input_ids": prompt[None], "decoder_input_ids": ids}
            if is_seq2seq
            else {"input_ids": ids}
        )
        logits = model(**inputs, use_cache=False).logits[0, -1]
        logits[subject.base.tokenizer.pad_token_id] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] == subject.base.tokenizer.eos_token_id:
            break
    return subject.base.tokenizer.decode(written[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged])
def test_text_is_that_of_a_search_without_cache_and_padding(subject, mode):
    learner = subject.learner(mode)
    with learner.evaluating() as model:
        found = generate_texts(model, subject.rows, subject.task, GREEDY, CPU).texts
        wanted = [slow_text(subject, model, row["prompt_ids"]) for row in subject.rows]
    learner.close()
    assert found == wanted
    assert len(set(found)) > 1


def test_adapters_change_the_text(subject):
    bare = generate_texts(subject.base.module, subject.rows, subject.task, GREEDY, CPU).texts
    assert bare != subject.write(GREEDY)


def test_merged_text_is_the_unmerged_one(subject):
    assert subject.write(SEARCH, mode=MergeMode.merged) == subject.write(SEARCH)


def test_text_does_not_depend_on_its_batch(subject):
    together = subject.write(SEARCH)
    alone = [subject.write(SEARCH, [row])[0] for row in subject.rows]
    assert together == alone
    assert subject.write(SEARCH, subject.rows[::-1]) == together[::-1]


@pytest.fixture(scope="module")
def bart() -> Subject:
    return Subject("tiny-bart")


def test_nothing_is_inherited_from_the_model(bart):
    module: Any = bart.base.module
    wanted = generate_texts(module, bart.rows, bart.task, SEARCH, CPU).texts
    own = module.generation_config
    recommended = copy.deepcopy(own)
    recommended.update(min_new_tokens=5, repetition_penalty=9.0, length_penalty=-5.0,
                       suppress_tokens=list(range(5, 40)))  # fmt: skip
    module.generation_config = recommended
    try:
        found = generate_texts(module, bart.rows, bart.task, SEARCH, CPU).texts
        assert module.generation_config is recommended
    finally:
        module.generation_config = own
    assert found == wanted


def test_first_token_that_a_model_forces_is_forced(bart):
    module: Any = bart.base.module
    module.generation_config.forced_bos_token_id = 20
    try:
        texts = generate_texts(module, bart.rows, bart.task, GREEDY, CPU).texts
    finally:
        module.generation_config.forced_bos_token_id = None
    word = bart.base.tokenizer.decode([20])
    assert {text.split()[0] for text in texts} == {word}


@pytest.mark.parametrize(
    ("objective", "given", "expected"),
    [
        ("seq2seq", {}, (128, 4, 3)),
        ("causal", {}, (40, 1, 2)),
        ("causal", {"num_beams": 5, "no_repeat_ngram": 0}, (40, 5, 0)),
        ("seq2seq", {"max_new_tokens": 7}, (7, 4, 3)),
    ],
)
def test_null_settings_are_the_papers(objective, given, expected):
    new, beams, ngram = expected
    found = resolve_decoding(GenerationConfig(**given, batch_size=9), text_problem(objective))
    assert found == Decoding(
        max_new_tokens=new, num_beams=beams, no_repeat_ngram=ngram, batch_size=9
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("generation.max_new_tokens=0", "a whole number >= 1, or null"),
        ("generation.num_beams=0", "a whole number >= 1, or null"),
        ("generation.no_repeat_ngram=-1", "a whole number >= 0, or null"),
        ("generation.batch_size=0", "a whole number >= 1"),
        ("evaluation.num_samples=-1", "a whole number >= 0"),
    ],
)
def test_impossible_settings_are_refused(override, words):
    with pytest.raises(ConfigError, match=f"{override}: wrong value; allowed: {words}"):
        validate(changed(override))


# What goes into a model and comes out of it -------------------------------------------------------


class Parrot(nn.Module):
    """Repeats the last token of a prompt twice, then ends; remembers its batches."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.generation_config = SimpleNamespace(
            decoder_start_token_id=None, forced_bos_token_id=None, forced_eos_token_id=None
        )
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.batches: list[list[int]] = []
        self.settings: Any = None

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, generation_config: Any):
        assert self.generation_config is generation_config
        self.settings = generation_config
        self.batches.append(attention_mask.sum(dim=1).tolist())
        last = input_ids[:, -1:]
        tail = torch.tensor([[self.end, self.pad]]).expand(len(last), 2)
        return torch.cat([input_ids, last, last, tail], dim=1)


@pytest.fixture
def parrot() -> tuple[Parrot, TaskData]:
    tokenizer = build_base_model(model_of("tiny-gpt2"), text_problem("causal"), seed=0).tokenizer
    return Parrot(tokenizer), task_of(text_problem("causal"), tokenizer)


def test_equal_prompts_are_answered_once_in_batches_of_like_length(parrot):
    model, task = parrot
    prompts = [[9], [7, 8], [9], [5, 6, 7, 8], [7, 8], [4, 4, 4]]
    rows = [{"prompt_ids": torch.tensor(prompt)} for prompt in prompts]
    found = generate_texts(model, rows, task, GenerationConfig(batch_size=2), CPU)
    word = {token: task.tokenizer.decode([token]) for token in range(4, 10)}
    assert found.texts == [f"{word[prompt[-1]]} {word[prompt[-1]]}" for prompt in prompts]
    assert model.batches == [[4, 3], [2, 1]]
    assert found.num_tokens == 4 * 3  # two words and the end; padding is no token
    assert found.tokens_per_second == pytest.approx(12 / found.seconds)


def test_users_equal_prompts_are_answered_once_for_each(parrot):
    model, task = parrot
    told: list[Any] = []
    prompts = [[9], [7, 8], [9], [9], [5, 6, 7], [7, 8], [4, 4, 4, 4]]
    rows = [{"prompt_ids": torch.tensor(prompt)} for prompt in prompts]
    found = generate_texts(
        model, rows, task, GenerationConfig(batch_size=3), CPU, owners=[2, 1, 0, 2, 1, 1, 0],
        route=lambda rows: told.append((len(model.batches), rows)),
    )  # fmt: skip
    word = {token: task.tokenizer.decode([token]) for token in range(4, 10)}
    assert found.texts == [f"{word[prompt[-1]]} {word[prompt[-1]]}" for prompt in prompts]
    # The longest first over all, and user by user inside a batch.
    assert model.batches == [[4, 3, 2], [1, 1]]
    assert told == [
        (0, UserRows(users=(0, 1), counts=(1, 2))), (1, UserRows(users=(0, 2), counts=(1, 1))),
    ]  # fmt: skip


@pytest.mark.parametrize("config", [GREEDY, SEARCH], ids=["greedy", "beams"])
def test_text_of_a_user_is_that_of_the_users_adapters(subject, config):
    """Beams multiply the rows of a batch where they lie, and stay their user's."""
    owners = [1, 0, 1, 0]
    routed, module = Routed(subject), subject.base.module
    routed.put_on(module)
    try:
        mixed = generate_texts(module, subject.rows, subject.task, config, CPU, owners=owners,
                               route=routed.route).texts  # fmt: skip
        apart = []
        for row, owner in zip(subject.rows, owners, strict=True):
            routed.route(UserRows.of([owner]))
            apart += generate_texts(module, [row], subject.task, config, CPU).texts
        routed.route(UserRows.of([1]))
        other = generate_texts(module, [subject.rows[1]], subject.task, config, CPU).texts
    finally:
        routed.handle.remove()
    assert mixed == apart
    assert other != mixed[1:2]


class Routed:
    """Adds a vector of each row's user to what one layer answers."""

    def __init__(self, subject: Subject) -> None:
        self.site = next(iter(subject.base.sites))
        self.rows: UserRows | None = None
        self.handle: Any = None

    def route(self, rows: UserRows | None) -> None:
        self.rows = rows

    def put_on(self, module: nn.Module) -> None:
        self.handle = module.get_submodule(self.site).register_forward_hook(self._add)

    def _add(self, _: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        assert self.rows is not None
        spread = self.rows.spread(len(hidden))
        assert spread is not None
        hidden = hidden.clone()
        for user, where in spread.slices():
            generator = torch.Generator().manual_seed(user)
            own = torch.randn(hidden.shape[-1], generator=generator, dtype=hidden.dtype)
            hidden[where] += 3 * own
        return hidden


def test_search_is_the_papers(parrot):
    model, task = parrot
    generate_texts(model, [{"prompt_ids": torch.tensor([5])}], task, GenerationConfig(), CPU)
    found = model.settings
    assert (found.max_new_tokens, found.num_beams, found.no_repeat_ngram_size) == (40, 1, 2)
    assert (found.do_sample, found.use_cache, found.early_stopping) == (False, True, None)
    generate_texts(model, [{"prompt_ids": torch.tensor([5])}], task, SEARCH, CPU)
    assert (model.settings.num_beams, model.settings.early_stopping) == (3, True)


def test_model_gets_its_own_settings_back_after_a_failure(parrot):
    model, task = parrot
    own = model.generation_config
    with pytest.raises(IndexError):
        generate_texts(model, [{"prompt_ids": torch.tensor([99999])}], Broken.of(task),
                       GenerationConfig(), CPU)  # fmt: skip
    assert model.generation_config is own


class Broken:
    """A task whose prompts cannot be padded."""

    @staticmethod
    def of(task: TaskData) -> Any:
        def collate_prompts(rows: Any) -> Any:
            raise IndexError

        return SimpleNamespace(
            problem=task.problem, tokenizer=task.tokenizer, collate_prompts=collate_prompts
        )


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "new", "message"),
    [
        ("causal", 40, r"max_new_tokens=40 after a prompt of task.max_length=128 tokens needs 168 "
         r"positions, and the model has 167; lower generation.max_new_tokens or task.max_length"),
        ("seq2seq", 167, r"max_new_tokens=167 after the start token needs 168 positions"),
    ],
)  # fmt: skip
def test_text_beyond_the_last_position_is_refused(objective, new, message):
    model = nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=167)
    config, problem = GenerationConfig(max_new_tokens=new), text_problem(objective)
    with pytest.raises(ConfigError, match=message):
        check_positions(model, config, problem)
    model.config.max_position_embeddings = 168
    check_positions(model, config, problem)


def test_model_without_a_last_position_writes_on():
    model = nn.Module()
    model.config = SimpleNamespace()
    check_positions(model, GenerationConfig(max_new_tokens=10**6), text_problem("causal"))
