"""Encoded rows, held as flat tensors: a set of 400,000 rows is a handful of objects.

`TokenTable` is what tokenising yields and what the cache stores; `EncodedRows` is what a `Split`
holds: a sequence of rows that are views into it, with whatever else a row carries beside tokens.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor

from cola.task_data import Example

TokenRow = Mapping[str, Sequence[int]]
"""Token ids, or labels, of one row by column."""


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Columns of N rows of different lengths, each laid end to end.

    Attributes:
        tokens: (sum of the column's lengths,) int32 by column.
        lengths: (N,) int32 by column.
        cut_rows: rows that lost tokens to the length limit.
        cut_tokens: tokens that they lost.
    """

    tokens: dict[str, Tensor]
    lengths: dict[str, Tensor]
    cut_rows: int
    cut_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows, the same number in every column."""
        return len(next(iter(self.lengths.values()), ()))


def build_table(rows: Iterable[tuple[TokenRow, int]]) -> TokenTable:
    """Lay rows end to end.

    Args:
        rows: each with the number of tokens that it lost to the length limit; all have the same
            columns.
    """
    tokens: dict[str, array[int]] = {}
    lengths: dict[str, array[int]] = {}
    cut_rows = cut_tokens = 0
    for row, lost in rows:
        for column, ids in row.items():
            tokens.setdefault(column, array("i")).extend(ids)
            lengths.setdefault(column, array("i")).append(len(ids))
        cut_rows += lost > 0
        cut_tokens += lost
    return TokenTable(
        tokens={column: _tensor(ids) for column, ids in tokens.items()},
        lengths={column: _tensor(counts) for column, counts in lengths.items()},
        cut_rows=cut_rows,
        cut_tokens=cut_tokens,
    )


class EncodedRows(Sequence[Example]):
    """Rows of a table, each a mapping of views (T,) int32 and of values."""

    def __init__(self, table: TokenTable, values: Mapping[str, Sequence[Any]]) -> None:
        assert all(len(column) == table.num_rows for column in values.values())
        self._table = table
        self._values = values
        self._bounds = {
            column: [0, *accumulate(lengths.tolist())] for column, lengths in table.lengths.items()
        }

    def with_values(self, values: Mapping[str, Sequence[Any]]) -> "EncodedRows":
        """The same rows with further values, one per row."""
        return EncodedRows(self._table, {**self._values, **values})

    def column(self, name: str) -> Sequence[Any] | None:
        """A value of every row, without making the rows; None where they have none of the name."""
        return self._values.get(name)

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        where = range(len(self))[index]
        return [self._row(i) for i in where] if isinstance(where, range) else self._row(where)

    def _row(self, index: int) -> Example:
        row: dict[str, Any] = {}
        for column, bounds in self._bounds.items():
            row[column] = self._table.tokens[column][bounds[index] : bounds[index + 1]]
        return row | {name: column[index] for name, column in self._values.items()}


def _tensor(numbers: "array[int]") -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
