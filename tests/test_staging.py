"""Memory that data lands in: used again as soon as nobody has it, and not a moment earlier."""

import threading

import pytest
import torch
from torch import Tensor

from cola.offload.staging import Staging


class Host:
    """Counts what is pinned."""

    def __init__(self) -> None:
        self.pinned: list[int] = []

    def pin(self, num_bytes: int) -> Tensor:
        self.pinned.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)


def numbers(num: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.arange(num).to(dtype)


@pytest.mark.parametrize(
    "like",
    [
        numbers(15, torch.float64).view(3, 5),
        numbers(15, torch.bfloat16).view(3, 5).T,
        numbers(120, torch.float32).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        numbers(6, torch.float32).view(2, 3)[:, :0],
        torch.ones(1).expand(4, 3),
        torch.tensor(7.0),
    ],
    ids=["matrix", "transposed", "channels last", "empty", "expanded", "scalar"],
)
def test_memory_is_laid_out_like_what_lands_in_it(like: Tensor) -> None:
    landed = Staging(Host().pin).take(like).copy_(like)
    assert torch.equal(landed, like)
    assert (landed.dtype, landed.stride()) == (like.dtype, torch.empty_like(like).stride())


def test_a_block_is_used_again_with_its_last_view() -> None:
    host = Host()
    staging = Staging(host.pin)
    first = staging.take(numbers(100)).copy_(numbers(100))
    view = first.view(4, 25)[2]
    address = first.data_ptr()
    del first
    other = staging.take(numbers(120)).fill_(9)
    assert host.pinned == [128, 128]
    assert torch.equal(view, numbers(100)[50:75])
    del view
    again = staging.take(numbers(65))
    assert again.data_ptr() == address
    assert host.pinned == [128, 128]
    del other


def test_sizes_are_kept_apart() -> None:
    host = Host()
    staging = Staging(host.pin)
    for num in (64, 65, 128, 129, 1, 0, 64):
        staging.take(numbers(num))
    assert host.pinned == [64, 128, 256, 1]
    assert staging.num_bytes == sum(host.pinned)


def test_other_threads_give_memory_back() -> None:
    host = Host()
    staging = Staging(host.pin)
    taken = [staging.take(numbers(50)) for _ in range(8)]

    def drop() -> None:
        while taken:
            taken.pop()

    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [staging.take(numbers(50)) for _ in range(8)]
    assert len({memory.data_ptr() for memory in taken}) == 8
    assert host.pinned == [64] * 8


def test_a_staging_that_is_gone_leaves_its_memory_to_who_has_it() -> None:
    landed = Staging(Host().pin).take(numbers(100)).copy_(numbers(100))
    assert torch.equal(landed, numbers(100))
