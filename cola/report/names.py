"""What methods, tasks and columns are called wherever people read them: tables, figures, pages."""

_METHODS = {
    "ft": "FT",
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "ptuning": "p-tuning",
}
_ADAPTERS = {"lowrank": "low-rank", "linear": "linear", "mlp": "MLP"}
_TASKS = {
    "glue/mnli": "MNLI",
    "glue/sst2": "SST-2",
    "glue/mrpc": "MRPC",
    "glue/cola": "CoLA",
    "glue/qnli": "QNLI",
    "glue/qqp": "QQP",
    "glue/rte": "RTE",
    "glue/stsb": "STS-B",
    "fpb": "FPB",
    "wikisql": "WikiSQL",
    "samsum": "SAMSum",
    "e2e_nlg": "E2E NLG",
    "web_nlg": "WebNLG",
    "dart": "DART",
    "dolly": "Dolly",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
}
_COLUMNS = {"avg": "average", "all_unmerged": "all, unmerged", "all_merged": "all, merged"}


def method_label(method: str, adapter: str = "", merge: str = "") -> str:
    """`LoRA`, `ColA low-rank`, `ColA linear, merged`, `ColA low-rank & MLP`.

    Args:
        method: as in `summary.json`.
        adapter: of gradient learning; kinds of the users' parts joined by `-`.
        merge: of gradient learning; the usual one, unmerged, is not said.
    """
    if method != "cola":
        return _METHODS.get(method, method)
    kinds = " & ".join(_ADAPTERS.get(kind, kind) for kind in adapter.split("-"))
    return f"ColA {kinds}" + (f", {merge}" if merge and merge != "unmerged" else "")


def task_label(task: str) -> str:
    """`MNLI` for `glue/mnli`; a task of no table is called what it is."""
    return _TASKS.get(task, task)


def column_label(column: str) -> str:
    """Heading of a table's column: a task, a user, or a summary of them."""
    return _COLUMNS.get(column) or _TASKS.get(column) or column.replace("_", " ")
