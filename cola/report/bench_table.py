"""Tables 10 to 18: what was measured, the paper's value beside it in parentheses.

One section for each machine, setting, model, batch size and kind of lengths. The paper's figures
were taken on an RTX A6000 and say how methods compare there, not what to expect here.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from cola.report.bench_published import PublishedRow, published_costs
from cola.report.table import MISSING, Mark, PrintedTable, Text, to_markdown

MIB = 2**20
MIB_PER_GIB = 1024

LEGEND = """\
Time is that of an iteration, end to end, among others that follow one another: the median, in
brackets the shortest and the longest.
Base, fit and stall: the base device's busy time in forward and backward, the fit of one adapter,
and the share of the time in which the base device's host waited for parameters. Base memory is the
peak that was allocated on the base device [reserved]; on a CPU it is what weights and optimizer
hold, without activations. Offload memory is what adapters, gradients, optimizer states, staging
and weights to merge hold where adapters are fitted. Tokens are without padding. Ratios are time /
base memory; ~ marks a reference of another call. In parentheses: the paper's value, on its machine;
> marks a lower bound, ? a cell that is hard to read. Rows in italics are not the paper's."""

_HEADER = (
    "row",
    "time, ms",
    "base, ms",
    "fit, ms",
    "stall, %",
    "base, MiB",
    "offload, MiB",
    "out and back, MiB",
    "tokens/s",
    "x LoRA",
    "x LoRA bf16",
    "x floor",
)
_REFERENCES = ("lora", "lora-bfloat16", "floor")
_RECORD = (
    "table",
    "model",
    "dtype",
    "users",
    "batch_size",
    "lengths",
    "label",
    "method",
    "adapter",
    "merge",
    "offload",
    "trainable_parameters",
    "seconds",
    "base_seconds",
    "offload_seconds_per_adapter",
    "stall_share",
    "base_mib",
    "offload_mib",
    "sent_bytes",
    "returned_bytes",
    "real_tokens_per_second",
)
_PUBLISHED = (
    "memory_base_gib",
    "memory_offload_mib",
    "time_base_cpu_s",
    "time_base_gpu_s",
    "time_offload_cpu_s",
    "time_offload_gpu_s",
)


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All sections and the legend as Markdown.

    Args:
        rows: of `results.json`, those of one section together.
    """
    return f"{to_markdown(cost_sections(rows))}\n\n{LEGEND}"


def cost_sections(rows: Sequence[Mapping[str, Any]]) -> list[PrintedTable]:
    """A table for each section.

    Args:
        rows: of `results.json`, those of one section together.
    """
    return [_section(title, list(group)) for title, group in groupby(rows, key=_title)]


def unmeasured(table: int, rows: Sequence[Mapping[str, Any]]) -> list[PrintedTable]:
    """The paper's rows that are not among some measured ones, with its values.

    Args:
        table: of the paper.
        rows: of `results.json`, of any table.
    """
    done = {published_row(row) for row in rows if row["table"] == table and row["is_plain"]}
    left = [_as_row(key) for key in published_costs() if key.table == table and key not in done]
    return [
        _section(f"Table {table}, {model}, batch size {size}: not measured", list(group))
        for (model, size), group in groupby(left, key=lambda row: (row["model"], row["batch_size"]))
    ]


def cost_records(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record for every row: its figures by name, the paper's with `published_` before it."""
    return [
        {key: row.get(key) for key in _RECORD}
        | {f"published_{key}": published_of(row).get(key, "") for key in _PUBLISHED}
        for row in rows
    ]


def published_of(row: Mapping[str, Any]) -> Mapping[str, str]:
    """The paper's cells of a row; empty if it is not the paper's."""
    if row["table"] is None or not row["is_plain"]:
        return {}
    return published_costs().get(published_row(row), {})


def published_row(row: Mapping[str, Any]) -> PublishedRow:
    """Which row of the paper a measured one is, if it is one at all."""
    return PublishedRow(**{name: row[name] for name in PublishedRow.__dataclass_fields__})


def _as_row(key: PublishedRow) -> dict[str, Any]:
    """A row of the paper as if it had been tried; its fits on the CPU stand for all placements."""
    label = f"cola-{key.adapter}-{key.merge}" if key.adapter else key.method
    offload = "cpu" if key.adapter else ""
    return vars(key) | {
        "label": label,
        "offload": offload,
        "is_plain": True,
        "skipped": "not measured",
    }


def _title(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    gpus = machine["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else machine["processor"]
    table = f"Table {row['table']}, " if row["table"] else ""
    lengths = "" if row["lengths"] == "full" else f", lengths of {row['lengths']}"
    settings = f"; {' '.join(row['settings'])}" if row["settings"] else ""
    return (
        f"{table}{row['model']} in {row['dtype']}, batch size {row['batch_size']}{lengths}; "
        f"{where}, {machine['threads']} threads{settings}"
    )


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> PrintedTable:
    lines = [(_name(row), *map(_cell, _cells(row))) for row in rows]
    # Columns that say nothing are left out.
    kept = [i for i, cells in enumerate(zip(*lines, strict=True)) if set(cells) != {Text()}]
    return PrintedTable(
        title=title,
        header=tuple(_HEADER[i] for i in kept),
        num_labels=1,
        lines=tuple(tuple(line[i] for i in kept) for line in lines),
    )


def _name(row: Mapping[str, Any]) -> Text:
    return Text(main=row["label"], mark=Mark.plain if published_of(row) else Mark.aside)


def _cell(text: str) -> Text:
    return Text(main=text)


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    """Figures of a row in the order of the header, the paper's beside them."""
    paper = _Paper(row)
    is_cola = row["method"] == "cola"
    if "seconds" not in row:
        yield from (_reason(row), MISSING + paper.base(), MISSING + paper.fit(), MISSING)
        yield from (MISSING + paper.base_memory(), MISSING + paper.offload_memory())
        yield from [MISSING] * (len(_HEADER) - 7)
        return
    low, high = row["seconds_spread"]
    reserved = next(iter(row["peak_reserved_mib"].values()), 0.0)  # the base device comes first
    base = f"{row['base_mib']:,.1f}" + (f" [{reserved:,.0f}]" if reserved else "")
    yield f"{_ms(row['seconds'])} [{_ms(low)}, {_ms(high)}]"
    yield _ms(row["synchronised"]["base_seconds"][0]) + paper.base()
    yield _ms(row["offload_seconds_per_adapter"], digits=2) + paper.fit() if is_cola else MISSING
    yield f"{100 * row['stall_share']:.0f}" if is_cola else MISSING
    yield base + paper.base_memory()
    yield f"{row['offload_mib']:,.1f}{paper.offload_memory()}" if is_cola else MISSING
    yield _both_ways(row)
    yield f"{row['real_tokens_per_second']:,.0f}"
    yield from (_ratio(row["ratios"].get(label)) for label in _REFERENCES)


def _reason(row: Mapping[str, Any]) -> str:
    if "does_not_fit" in row:
        return f"does not fit: {row['does_not_fit']}"
    reason: str = row["skipped"] if "skipped" in row else f"failed: {row['failed']}"
    return reason


def _ms(seconds: float, digits: int = 1) -> str:
    return f"{1000 * seconds:,.{digits}f}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return MISSING
    mark = "" if ratio["same_call"] else "~"
    return f"{mark}{ratio['seconds']:.2f} / {ratio['base_mib']:.2f}"


class _Paper:
    """The paper's cells of a row as they are appended to ours, in the same units."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._cells = published_of(row)
        self._uncertain = self._cells.get("uncertain_cells", "").split()
        # Rows by back-propagation have one time; adapters on the base device have none there.
        self._device = {"": "cpu", "cpu": "cpu", "gpu": "gpu"}.get(row["offload"])

    def base(self) -> str:
        return self._shown(f"time_base_{self._device}_s", 1000)

    def fit(self) -> str:
        return self._shown(f"time_offload_{self._device}_s", 1000)

    def base_memory(self) -> str:
        return self._shown("memory_base_gib", MIB_PER_GIB)

    def offload_memory(self) -> str:
        bound = self._cells.get("memory_offload_is_lower_bound") == "true"
        return self._shown("memory_offload_mib", 1, ">" if bound else "")

    def _shown(self, column: str, factor: float, sign: str = "") -> str:
        value = self._cells.get(column, "")
        if not value:
            return ""
        doubt = "?" if column in self._uncertain else ""
        return f" ({sign}{float(value) * factor:,.6g}{doubt})"


def _both_ways(row: Mapping[str, Any]) -> str:
    """Bytes of an iteration, adaptation data and parameters."""
    if not row["sent_bytes"]:
        return MISSING
    return f"{row['sent_bytes'] / MIB:,.1f}, {row['returned_bytes'] / MIB:,.1f}"
