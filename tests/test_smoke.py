"""Every task with every method runs end to end on the CPU: `make smoke`.

Two steps each, on tiny models and built-in sample rows; one's own files are written here.
"""

import gzip
import json
import math
from pathlib import Path

import pytest

from tests.runs import Run, run

pytestmark = [pytest.mark.slow, pytest.mark.smoke]

WRITERS = ("fpb", "wikisql", "samsum", "e2e_nlg", "web_nlg", "dart", "dolly", "synthetic")
SUBSETS = ("cola", "mnli", "sst2", "mrpc", "qnli", "qqp", "rte", "stsb")
COLA = {
    "cola-lowrank": ("adapter=lowrank",),
    "cola-lowrank-merged-cpu": ("adapter=lowrank", "merge=merged", "offload=cpu"),
    "cola-linear": ("adapter=linear",),
    "cola-linear-merged": ("adapter=linear", "merge=merged"),
    "cola-mlp-cpu": ("adapter=mlp", "offload=cpu"),
}
AUTOGRAD = {name: (f"method={name}",) for name in ("ft", "lora")}
PEFT = {
    name: (f"method={name}",) for name in ("adalora", "ia3", "prompt", "prefix", "ptuning")
}  # fmt: skip

TEXT_TASKS = {
    **{f"glue-{s}": ("task=glue", f"task.subset={s}", "model=tiny-roberta") for s in SUBSETS},
    **{f"{t}-bart": (f"task={t}", "model=tiny-bart") for t in WRITERS},
    **{f"{t}-gpt2": (f"task={t}", "model=tiny-gpt2") for t in WRITERS},
    **{f"{t}-llama": (f"task={t}", "model=tiny-llama") for t in ("e2e_nlg", "dolly")},
    "synthetic-roberta": ("task=synthetic", "model=tiny-roberta"),
    "jsonl-roberta": ("task=jsonl", "model=tiny-roberta"),
    "jsonl-gpt2": ("task=jsonl", "model=tiny-gpt2"),
    "jsonl-bart": ("task=jsonl", "model=tiny-bart"),
}
IMAGE_TASKS = {
    f"{task}-{model}": (f"task={task}", f"model={model}")
    for task in ("digits", "mnist", "cifar10")
    for model in ("linear", "mlp", "cnn")
}
METRICS = {"glue-cola": "matthews_correlation", "glue-stsb": "pearson"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of one's own."""
    folder = tmp_path_factory.mktemp("data")
    with gzip.open(folder / "own.jsonl.gz", "wt", encoding="utf-8") as file:
        for index in range(40):
            row = {"text": f"the fox near the jay {index}", "kind": "ab"[index % 2], "who": "me"}
            file.write(json.dumps(row) + "\n")
    return folder


def overrides_of(task: str, data_dir: Path) -> list[str]:
    if task.startswith("jsonl"):
        return [f"task.train_file={data_dir}/own.jsonl.gz", "task.template='{text}'",
                "task.target=kind", "task.user=who"]  # fmt: skip
    return [] if task.startswith(("digits", "synthetic")) else ["data_dir=builtin"]


def smoke(folder: Path, task: str, lines: tuple[str, ...], data_dir: Path) -> Run:
    return run(
        folder,
        *lines,
        *overrides_of(task, data_dir),
        "trainer.max_steps=2",
        "trainer.batch_size=4",
        "trainer.log_every=1",
        "task.max_eval_rows=8",
    )


@pytest.mark.parametrize("method", [*COLA, *AUTOGRAD, *PEFT])
@pytest.mark.parametrize("task", TEXT_TASKS)
def test_a_text_task_runs_with_every_method(
    tmp_path: Path, data_dir: Path, task: str, method: str
) -> None:
    lines = (COLA | AUTOGRAD | PEFT)[method]
    done = smoke(tmp_path / "run", task, (*TEXT_TASKS[task], *lines), data_dir)
    writes = not task.endswith("-roberta") and not task.startswith("glue")
    expected = "rougeL" if writes else METRICS.get(task, "accuracy")
    check(done, expected)
    samples = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(isinstance(json.loads(line)["prediction"], str) for line in samples)
    assert len(samples) > 0


@pytest.mark.parametrize("method", [*COLA, *AUTOGRAD])
@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_an_image_task_runs_with_every_method(
    tmp_path: Path, data_dir: Path, task: str, method: str
) -> None:
    lines = (COLA | AUTOGRAD)[method]
    check(smoke(tmp_path / "run", task, (*IMAGE_TASKS[task], *lines), data_dir), "accuracy")


def check(done: Run, metric: str) -> None:
    result = done.summary["result"]
    assert result["metric"] == metric
    assert math.isfinite(result["value"])
    assert len(done.losses) == 2
    assert all(math.isfinite(loss) for loss in done.losses)
