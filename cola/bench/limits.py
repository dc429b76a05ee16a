"""What does not fit, told apart from other failures."""

from collections.abc import Iterator

import torch

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def does_not_fit(error: BaseException) -> bool:
    """Whether an error says that memory of a device or of the host is gone."""
    return any(
        isinstance(one, MemoryError | torch.OutOfMemoryError)
        or (isinstance(one, RuntimeError) and any(word in str(one).lower() for word in _WORDS))
        for one in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: a worker wraps what it met."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
