"""One row of a computation table: a run's configuration, and what the row is called."""

from dataclasses import dataclass
from typing import Any

from cola.config.choices import MethodName
from cola.config.schema import BenchConfig, ExperimentConfig

FLOOR = "floor"

_NOTES = {
    "lora-activation-offload": "torch's save_on_cpu, which waits for every copy",
    "adalora": "its whole schedule of ranks within the iterations",
}


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One row.

    Attributes:
        name: what `bench.rows` selects: `lora/b8`, with several models `mlp/lora/b8`.
        label: the name without model and batch size.
        config: valid for a run, defaults resolved.
        overrides: how it differs from the table's configuration, as key=value.
        is_floor: nothing is trained.
    """

    name: str
    label: str
    config: ExperimentConfig
    overrides: tuple[str, ...]
    is_floor: bool

    @property
    def is_cola(self) -> bool:
        """Whether it learns by gradient learning."""
        return self.config.method.name is MethodName.cola and not self.is_floor

    @property
    def method(self) -> str:
        """`floor`, or the method's name."""
        return FLOOR if self.is_floor else self.config.method.name.name

    @property
    def adapter(self) -> str:
        """Kind of the adapters, of the users' parts if they differ; empty for other methods."""
        if not self.is_cola:
            return ""
        return "-".join(self.config.users.kinds or [self.config.adapter.kind.name])

    @property
    def merge(self) -> str:
        """Merge mode; empty for methods that have none."""
        return self.config.merge.mode.name if self.is_cola else ""

    @property
    def offload(self) -> str:
        """Where adapters are fitted; empty for methods that fit none."""
        return self.config.offload.name.name if self.is_cola else ""

    @property
    def num_users(self) -> int:
        """K; 1 where users have no adapters of their own."""
        return self.config.users.num or 1

    @property
    def batch_size(self) -> int:
        """Rows of a batch, of all users together."""
        return self.config.trainer.batch_size

    @property
    def is_plain(self) -> bool:
        """Whether it is in the form that the paper measures, which knows no floor."""
        if self.is_cola:
            model = self.config.model
            return not (model.gradient_checkpointing or model.cuda_graphs)
        return self.label == self.config.method.name.name

    def facts(self, bench: BenchConfig) -> dict[str, Any]:
        """What is known without measuring, for the record; `bench`: how it is measured."""
        return {
            "name": self.name,
            "label": self.label,
            "table": bench.table,
            "is_plain": self.is_plain,
            "model": self.config.model.name,
            "dtype": self.config.model.dtype.name,
            "method": self.method,
            "adapter": self.adapter,
            "merge": self.merge,
            "offload": self.offload,
            "users": self.num_users,
            "batch_size": self.batch_size,
            "lengths": bench.lengths.name,
            "overrides": list(self.overrides),
            "note": _NOTES.get(self.label, ""),
        }
