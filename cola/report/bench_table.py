"""Tables 10 to 18 as Markdown: what was measured, the paper's value beside it in parentheses.

One section for each machine, setting, model, batch size and kind of lengths. The paper's figures
were taken on an RTX A6000 and say how methods compare there, not what to expect here.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from cola.report.bench_published import PublishedRow, published_costs
from cola.report.text import format_table

MISSING = "-"
MIB = 2**20
MIB_PER_GIB = 1024

LEGEND = """\
Time is that of an iteration, end to end: iterations follow one another, wait for what is under way
only after the last one, and share that wait; in brackets the shortest and the longest, without it.
Base, fit and stall: the base device's busy time in forward and backward, the fit of one adapter,
and the share of the time in which the base device's host waited for parameters. Base memory is the
peak that was allocated on the base device [reserved]; on a CPU it is what weights and optimizer
hold, without activations. Offload memory is what adapters, gradients, optimizer states and staging
hold where they are fitted. Tokens are without padding. Ratios are time / base memory; ~ marks a
reference of another call. In parentheses: the paper's value, on its machine; > marks a lower bound,
? a cell that is hard to read. Rows in italics are not the paper's."""

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


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All sections and the legend.

    Args:
        rows: of `results.json`, those of one section together.
    """
    sections = []
    for title, group in groupby(rows, key=_title):
        table = _without_empty([list(_HEADER), *([_name(row), *_cells(row)] for row in group)])
        sections.append(f"**{title}**\n\n{format_table(table[0], table[1:])}")
    return "\n\n".join([*sections, LEGEND])


def published_of(row: Mapping[str, Any]) -> Mapping[str, str]:
    """The paper's cells of a row; empty if it is not the paper's."""
    if row["table"] is None or not row["is_plain"]:
        return {}
    key = PublishedRow(
        table=row["table"],
        model=row["model"],
        users=row["users"],
        batch_size=row["batch_size"],
        method=row["method"],
        adapter=row["adapter"],
        merge=row["merge"],
    )
    return published_costs().get(key, {})


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


def _without_empty(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """Header and lines without the columns that say nothing."""
    kept = [
        index for index, cells in enumerate(zip(*table[1:], strict=True)) if set(cells) != {MISSING}
    ]
    return [[line[index] for index in kept] for line in table]


def _name(row: Mapping[str, Any]) -> str:
    return row["label"] if published_of(row) else f"*{row['label']}*"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "seconds" not in row:
        return [_reason(row), *[MISSING] * (len(_HEADER) - 2)]
    paper = _Paper(row)
    parts = row["synchronised"]
    is_cola = row["method"] == "cola"
    reserved = sum(row["peak_reserved_mib"].values())
    base = f"{row['base_mib']:,.1f}" + (f" [{reserved:,.0f}]" if reserved else "")
    fit = _ms(row["offload_seconds_per_adapter"], digits=2) + paper.fit() if is_cola else MISSING
    low, high = row["seconds_spread"]
    return [
        f"{_ms(row['seconds'])} [{_ms(low)}, {_ms(high)}]",
        _ms(parts["base_seconds"][0]) + paper.base(),
        fit,
        f"{100 * row['stall_share']:.0f}" if is_cola else MISSING,
        base + paper.base_memory(),
        f"{row['offload_mib']:,.1f}{paper.offload_memory()}" if is_cola else MISSING,
        _both_ways(row),
        f"{row['real_tokens_per_second']:,.0f}",
        *(_ratio(row["ratios"].get(label)) for label in _REFERENCES),
    ]


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
