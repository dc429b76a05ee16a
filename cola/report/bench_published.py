"""The paper's values of Tables 10 to 18, row by row.

Measured by its authors on an RTX A6000 (48 GB) with a Xeon Gold 5320. Methods by back-propagation
print one memory and one time, which stand in the columns of the base device.
"""

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """Which row of which table."""

    table: int
    model: str
    users: int
    batch_size: int
    method: str
    adapter: str
    merge: str


@functools.cache
def published_costs() -> Mapping[PublishedRow, Mapping[str, str]]:
    """Cells by column, as text; empty where the paper prints a dash or its text is lost.

    Columns: `memory_base_gib`, `memory_offload_mib` (a lower bound where
    `memory_offload_is_lower_bound` is true), seconds `time_base_cpu_s`, `time_base_gpu_s` of the
    base part and `time_offload_cpu_s`, `time_offload_gpu_s` of one adapter's fit, by the device
    that fits; `uncertain_cells` names those that are hard to read.
    """
    source = resources.files("cola.report") / "published" / "computation.csv"
    return {
        PublishedRow(
            table=int(line["table"]),
            model=line["model"],
            users=int(line["users"]),
            batch_size=int(line["batch_size"]),
            method=line["method"],
            adapter=line["adapter"],
            merge=line["merge"],
        ): line
        for line in csv.DictReader(source.read_text(encoding="utf-8").splitlines())
    }
