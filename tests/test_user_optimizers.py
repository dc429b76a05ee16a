"""Users stepped as one stack: each as if it had a torch optimizer of its own."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cola.config.choices import OptimizerName
from cola.config.schema import OptimizerConfig
from cola.user_optimizers import UserOptimizer
from cola.user_steps import UserStep, step_together
from tests.tolerances import FLOAT32

SHAPES = {"lora_a": (2, 3), "lora_b": (4, 2), "bias": (3,)}
CONFIGS = {
    "adamw": OptimizerConfig(weight_decay=0.1),
    "adamw-no-decay": OptimizerConfig(weight_decay=0.0),
    "sgd": OptimizerConfig(name=OptimizerName.sgd, weight_decay=0.1),
    "sgd-no-nesterov": OptimizerConfig(name=OptimizerName.sgd, nesterov=False),
    "sgd-no-momentum": OptimizerConfig(name=OptimizerName.sgd, momentum=0.0, nesterov=False),
}

by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@dataclass(frozen=True)
class Step:
    users: tuple[int, ...]
    rate: float = 0.05
    size: float = 1.0


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def stacks(num_users: int) -> dict[str, Tensor]:
    return {
        name: normal(seed, num_users, *shape) for seed, (name, shape) in enumerate(SHAPES.items())
    }


def gradients_of(number: int, step: Step, num_users: int) -> dict[str, Tensor]:
    """Of the users who step; the others' are not numbers, which would show wherever they got to."""
    absent = [user for user in range(num_users) if user not in step.users]
    result = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        gradient = step.size * normal(100 * number + seed, num_users, *shape)
        gradient[absent] = torch.nan
        result[name] = gradient
    return result


def step_one(
    optimizer: UserOptimizer, gradients: dict[str, Tensor], rate: float, users: Sequence[int]
) -> None:
    step_together([UserStep(optimizer, gradients, users)], rate)


@dataclass
class Together:
    """The optimizer in question, with its parameters."""

    config: OptimizerConfig
    rates: Sequence[float]
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = self.parameters or stacks(len(self.rates))
        self.optimizer = UserOptimizer(
            self.parameters, self.config, name=self.config.name, rates=self.rates
        )

    def run(self, steps: Sequence[Step], first: int = 0) -> None:
        for number, step in enumerate(steps, start=first):
            gradients = gradients_of(number, step, len(self.rates))
            step_one(self.optimizer, gradients, step.rate, step.users)


def apart(
    config: OptimizerConfig, rates: Sequence[float], steps: Sequence[Step]
) -> dict[str, Tensor]:
    """What torch makes of the same steps, user by user."""
    start = stacks(len(rates))
    result = {name: torch.empty_like(stack) for name, stack in start.items()}
    for user, rate in enumerate(rates):
        own = {name: nn.Parameter(stack[user].clone()) for name, stack in start.items()}
        optimizer = torch_optimizer(config, list(own.values()))
        for number, step in enumerate(steps):
            if user not in step.users:
                continue
            for name, gradient in gradients_of(number, step, len(rates)).items():
                own[name].grad = gradient[user]
            optimizer.param_groups[0]["lr"] = rate * step.rate
            optimizer.step()
        for name, parameter in own.items():
            result[name][user] = parameter.detach()
    return result


def torch_optimizer(config: OptimizerConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if config.name is OptimizerName.adamw:  # betas and eps are torch's own
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def assert_equal_numbers(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


NUM_USERS = 4

some_users = st.sets(st.integers(0, NUM_USERS - 1)).map(lambda users: tuple(sorted(users)))
some_steps = st.lists(
    st.builds(
        Step,
        users=some_users,
        rate=st.floats(0.001, 0.1),
        size=st.sampled_from([1.0, 1e-8, 0.0]),
    ),
    min_size=3,
    max_size=6,
)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(
    steps=some_steps,
    config=st.sampled_from(list(CONFIGS.values())),
    rates=st.lists(st.sampled_from([1.0, 0.5, 0.0]), min_size=NUM_USERS, max_size=NUM_USERS),
)
def test_every_user_equals_a_torch_optimizer_of_its_own(
    steps: list[Step], config: OptimizerConfig, rates: list[float]
) -> None:
    together = Together(config, rates)
    together.run(steps)
    assert_equal_numbers(together.parameters, apart(config, rates, steps))


ALL, SOME, OTHERS = (0, 1, 2), (0, 2), (1, 2)
STEPS = [Step(ALL), Step(SOME, 0.02), Step(OTHERS, 0.03), Step(ALL, 0.01), Step(SOME)]
RATES = [1.0, 0.5, 2.0]


@by_config
def test_absent_user_keeps_every_bit(config: OptimizerConfig) -> None:
    together = Together(config, RATES)
    together.run([Step(ALL)])
    parameters = {name: stack[1].clone() for name, stack in together.parameters.items()}
    state = together.optimizer.user_state(1)
    together.run([Step((0, 2)), Step((2,)), Step(())], first=1)
    for name, stack in together.parameters.items():
        assert torch.equal(stack[1], parameters[name])
    assert_same_state(together.optimizer.user_state(1), state)


@by_config
def test_loaded_optimizer_goes_on_with_the_same_bits(config: OptimizerConfig) -> None:
    straight = Together(config, RATES)
    straight.run(STEPS)
    first = Together(config, RATES)
    first.run(STEPS[:3])
    second = Together(config, RATES, copy.deepcopy(first.parameters))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.run(STEPS[3:], first=3)
    for name, stack in straight.parameters.items():
        assert torch.equal(second.parameters[name], stack)
    assert_same_state(second.optimizer.state_dict(), straight.optimizer.state_dict())


@by_config
def test_loading_copies_the_state(config: OptimizerConfig) -> None:
    first, second = Together(config, RATES), Together(config, RATES)
    first.run(STEPS[:3])
    before = copy.deepcopy(first.optimizer.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.run(STEPS[3:], first=3)
    assert_same_state(first.optimizer.state_dict(), before)


@by_config
def test_a_users_state_goes_on_in_another_optimizer(config: OptimizerConfig) -> None:
    first = Together(config, RATES)
    first.run(STEPS[:3])
    moved = {name: stack.clone() for name, stack in first.parameters.items()}
    second = Together(config, RATES, moved)  # where nobody has stepped
    for user in ALL:
        second.optimizer.load_user_state(user, first.optimizer.user_state(user))
    second.run(STEPS[3:], first=3)
    assert_equal_numbers(second.parameters, apart(config, RATES, STEPS))


@by_config
def test_a_users_state_is_a_copy(config: OptimizerConfig) -> None:
    together = Together(config, RATES)
    together.run(STEPS[:2])
    state = together.optimizer.user_state(2)
    before = copy.deepcopy(state)
    together.run(STEPS[2:], first=2)
    assert_same_state(state, before)


@by_config
def test_a_reset_user_starts_afresh_and_the_others_go_on(config: OptimizerConfig) -> None:
    together = Together(config, RATES)
    together.run([Step(ALL)])
    for name, stack in stacks(len(RATES)).items():
        together.parameters[name][1] = stack[1]
    together.optimizer.load_user_state(1, None)
    together.run(STEPS[1:], first=1)
    steps = [Step(SOME), *STEPS[1:]]  # as if user 1 had missed the first
    assert_equal_numbers(together.parameters, apart(config, RATES, steps))


def test_state_of_a_user_who_never_stepped_resets() -> None:
    config = CONFIGS["adamw"]
    fresh = Together(config, RATES).optimizer.user_state(0)
    together = Together(config, RATES)
    together.run([Step(ALL)])
    together.optimizer.load_user_state(0, fresh)
    state = together.optimizer.user_state(0)
    assert state["steps"] == 0
    assert not any(value.any() for own in state["moments"].values() for value in own.values())


@pytest.mark.parametrize(
    ("name", "keys"),
    [("adamw", ["exp_avg", "exp_avg_sq"]), ("sgd", ["momentum"]), ("sgd-no-momentum", [])],
)
def test_moments_are_held_from_the_first_step_on(name: str, keys: list[str]) -> None:
    together = Together(CONFIGS[name], RATES)
    assert together.optimizer.state_dict()["moments"] == {}
    together.run([Step(())])  # nobody's
    assert together.optimizer.num_bytes == 0
    together.run([Step((1,))], first=1)
    moments = together.optimizer.state_dict()["moments"]
    assert all(list(own) == keys for own in moments.values())
    held = sum(stack.nbytes for stack in together.parameters.values())
    assert together.optimizer.num_bytes == len(keys) * held


@by_config
def test_gradients_stay_as_they_are_whatever_their_strides(config: OptimizerConfig) -> None:
    parameters = {"weight": normal(0, 3, 4, 5), "other": normal(1, 3, 2)}
    wanted = {name: stack.clone() for name, stack in parameters.items()}
    strided = {"weight": normal(2, 5, 3, 4).permute(1, 2, 0), "other": normal(3, 2, 3).T}
    before = {name: gradient.clone() for name, gradient in strided.items()}
    dense = {name: gradient.contiguous() for name, gradient in strided.items()}
    for own, gradients in ((parameters, strided), (wanted, dense)):
        optimizer = UserOptimizer(own, config, name=config.name, rates=RATES)
        for users in (ALL, SOME):
            step_one(optimizer, gradients, 0.05, users)
    assert_equal_numbers(parameters, wanted)
    assert all(torch.equal(strided[name], before[name]) for name in before)


@by_config
def test_float32_follows_float64(config: OptimizerConfig) -> None:
    single = {name: stack.float() for name, stack in stacks(3).items()}
    optimizer = UserOptimizer(single, config, name=config.name, rates=RATES)
    for number, step in enumerate(STEPS):
        gradients = gradients_of(number, step, 3)
        single_gradients = {n: g.float() for n, g in gradients.items()}
        step_one(optimizer, single_gradients, step.rate, step.users)
    wanted = apart(config, RATES, STEPS)
    for name, start in stacks(3).items():
        moved = (wanted[name] - start).norm()
        assert (single[name].double() - wanted[name]).norm() <= FLOAT32 * moved


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@by_config
def test_a_gpu_is_not_waited_for_and_gives_the_same_numbers(config: OptimizerConfig) -> None:
    parameters = {name: stack.cuda() for name, stack in stacks(3).items()}
    optimizer = UserOptimizer(parameters, config, name=config.name, rates=RATES)
    stream = [{n: g.cuda() for n, g in gradients_of(i, s, 3).items()} for i, s in enumerate(STEPS)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradients, step in zip(stream, STEPS, strict=True):
            step_one(optimizer, gradients, step.rate, step.users)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = {name: stack.cpu() for name, stack in parameters.items()}
    assert_equal_numbers(found, apart(config, RATES, STEPS))


def assert_same_state(found: dict[str, object], wanted: dict[str, object]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)
