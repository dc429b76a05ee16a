"""Values that single settings may take, as a test and in words.

Part of `validate`; no Hydra and no torch.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values a key may take.

    Attributes:
        contains: whether a value is one of them.
        words: what they are.
    """

    contains: Callable[[Any], bool]
    words: str


COUNT = Range(contains=lambda value: value >= 1, words="a whole number >= 1")
OPTIONAL_COUNT = Range(
    contains=lambda value: value is None or value >= 1, words="a whole number >= 1, or null"
)
SIZE = Range(contains=lambda value: value >= 0, words="a whole number >= 0")
OPTIONAL_SIZE = Range(
    contains=lambda value: value is None or value >= 0, words="a whole number >= 0, or null"
)
SEED = Range(contains=lambda value: 0 <= value < 2**32, words="a whole number from 0 to 2**32-1")
# NaN fails every comparison, so these ranges exclude it.
POSITIVE = Range(contains=lambda value: 0 < value < math.inf, words="a number > 0")
NOT_NEGATIVE = Range(contains=lambda value: 0 <= value < math.inf, words="a number >= 0")
FRACTION = Range(contains=lambda value: 0 <= value < 1, words="a number from 0 to below 1")
NOT_EMPTY = Range(contains=lambda values: len(values) > 0, words="at least one")

RANGES: dict[str, Range] = {
    "task.max_length": COUNT,
    "task.max_train_rows": OPTIONAL_COUNT,
    "task.max_eval_rows": OPTIONAL_COUNT,
    "task.num_labels": Range(  # 0: the task's code knows
        contains=lambda value: value >= 0, words="a whole number >= 0"
    ),
    "task.image_shape": Range(
        contains=lambda shape: shape is None or (len(shape) == 3 and min(shape) >= 1),
        words="[channels, height, width], each >= 1, or null",
    ),
    "adapter.rank": COUNT,
    "adapter.hidden": Range(
        contains=lambda widths: len(widths) > 0 and min(widths) >= 1,
        words="at least one width, each >= 1",
    ),
    "adapter.alpha": POSITIVE,
    "method.init_rank": COUNT,
    "method.target_rank": COUNT,
    "method.beta": Range(contains=lambda value: 0 < value < 1, words="a number above 0, below 1"),
    "method.delta_t": COUNT,
    "method.init_ratio": FRACTION,
    "method.final_ratio": FRACTION,
    "method.orth_weight": NOT_NEGATIVE,
    "method.virtual_tokens": COUNT,
    "method.init_text": Range(contains=str.strip, words="a text that is not blank"),  # type: ignore[arg-type]
    "method.encoder_hidden": COUNT,
    "users.num": OPTIONAL_COUNT,
    "users.local_seconds": POSITIVE,
    "offload.workers": OPTIONAL_COUNT,
    "offload.staleness": Range(contains=lambda value: value in (0, 1), words="0 or 1"),
    "optimizer.lr": Range(
        contains=lambda value: value is None or 0 < value < math.inf,
        words="a number > 0, or null for the default of the method and task",
    ),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.momentum": FRACTION,
    "optimizer.clip_norm": POSITIVE,
    "schedule.warmup_ratio": FRACTION,
    "trainer.epochs": COUNT,
    "trainer.max_steps": OPTIONAL_COUNT,
    "trainer.batch_size": COUNT,
    "trainer.interval": COUNT,
    "trainer.log_every": COUNT,
    "trainer.eval_every": OPTIONAL_COUNT,
    "evaluation.batch_size": COUNT,
    "evaluation.num_samples": SIZE,
    "generation.max_new_tokens": OPTIONAL_COUNT,
    "generation.num_beams": OPTIONAL_COUNT,
    "generation.no_repeat_ngram": OPTIONAL_SIZE,
    "generation.batch_size": COUNT,
    "checkpoint.every": OPTIONAL_COUNT,
    "checkpoint.keep": COUNT,
    "bench.table": Range(
        contains=lambda value: value is None or 10 <= value <= 18,
        words="a table of the paper, 10 to 18, or null",
    ),
    "bench.rows": NOT_EMPTY,
    "bench.batch_sizes": Range(
        contains=lambda sizes: len(sizes) > 0 and min(sizes) >= 1,
        words="at least one number of rows, each >= 1",
    ),
    "bench.offload": NOT_EMPTY,
    "bench.warmup": COUNT,
    "bench.iterations": COUNT,
    "seed": SEED,
    "split_seed": SEED,
    "device": Range(contains=_DEVICE.fullmatch, words="auto, cpu, cuda or cuda:INDEX"),  # type: ignore[arg-type]
}
