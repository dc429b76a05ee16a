"""cola-bench on tiny shapes: what it measures, writes, skips and survives."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cola import benchmark, memory_plan, shortage
from cola.adapter_plan import plan_adapters
from cola.bench import limits, measure
from cola.bench.batches import build_batches, count_tokens, row_lengths
from cola.bench.results import add_ratios
from cola.bench.row import BenchRow
from cola.bench.rows import select_rows
from cola.bench.subjects import build_subject
from cola.cli import bench
from cola.config.choices import Objective, OffloadTarget, RowLengths
from cola.config.schema import BenchConfig
from cola.errors import OffloadError, SiteError
from cola.experiment import build_problem
from cola.models import BaseModel, build_base_model
from cola.offload.placing import OffloadPlan
from cola.report.bench_figure import draw_costs, plot_costs
from cola.report.bench_table import cost_table
from cola.tasks.encoding import IGNORED

TINY = ("experiment=table10", "model=tiny-roberta", "task.max_length=16", "device=cpu")
QUICK = ("bench.batch_sizes=[2]", "bench.warmup=1", "bench.iterations=2")
ROWS = ("bench.rows=[floor,lora,cola-lowrank-merged-cpu]",)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One small call's folder."""
    folder = tmp_path_factory.mktemp("bench")
    lines = [*TINY, *QUICK, *ROWS, f"hydra.run.dir={folder}", "bench.offload=[cpu,gpu]"]
    assert bench.run_bench(lines) == 0
    return folder


@pytest.fixture
def no_figure(monkeypatch):
    """A figure takes longer than all rows of a tiny table."""
    monkeypatch.setattr(benchmark, "plot_costs", lambda rows, path: path)


def results_of(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / "results.json").read_text())
    return {row["label"]: row for row in content["rows"]}


@functools.cache
def rows_of(*lines: str) -> dict[str, BenchRow]:
    return {row.label: row for row in select_rows(bench._compose(lines)[0])}


def build(row: BenchRow) -> tuple[BaseModel, object]:
    problem = build_problem(row.config)
    return build_base_model(row.config.model, problem, seed=0), problem


def test_a_call_leaves_json_table_and_figure(finished):
    rows = results_of(finished)
    assert list(rows) == ["floor", "lora", "cola-lowrank-merged-cpu"]
    content = json.loads((finished / "results.json").read_text())
    assert content["calls"][0]["command"][0] == "cola-bench"
    assert {"machine", "versions", "commit", "started"} <= content["calls"][0].keys()
    cola = rows["cola-lowrank-merged-cpu"]
    assert cola["seconds"] > 0
    assert min(cola["sent_bytes"], cola["returned_bytes"]) > 0 == rows["lora"]["sent_bytes"]
    assert (cola["tokens"], cola["real_tokens"], cola["iterations"]) == (32, 32, 2)
    assert all(math.isfinite(value) for value in cola["synchronised"]["iteration_seconds"])
    assert cola["trainable_parameters"] == rows["lora"]["trainable_parameters"] > 0
    # Merged adapters are not on the base device: it holds what the floor holds, LoRA more.
    assert cola["base_mib"] == rows["floor"]["base_mib"] < rows["lora"]["base_mib"]
    assert cola["offload_mib"] > 0
    assert cola["ratios"]["floor"]["base_mib"] == 1
    assert cola["ratios"]["lora"]["same_call"]
    table = (finished / "table.md").read_text()
    assert "Table 10, tiny-roberta in float32, batch size 2" in table
    assert "| *cola-lowrank-merged-cpu* |" in table
    assert "bf16" not in table  # a float32 model has no such row
    assert (finished / "figure.png").stat().st_size > 10_000


def test_a_second_call_measures_what_is_missing(finished, monkeypatch, no_figure):
    before, measured = results_of(finished), []

    def count(row, config):
        measured.append(row.label)
        return {"does_not_fit": "too large"}

    monkeypatch.setattr(benchmark, "measure_row", count)
    folder = f"hydra.run.dir={finished}"
    lines = [*TINY, *QUICK, folder, "bench.rows=[floor,lora,cola-lowrank-merged-cpu,ft]"]
    assert bench.run_bench([*lines, "bench.offload=[cpu]"]) == 0
    assert measured == ["ft"]
    after = results_of(finished)
    assert {label: after[label] for label in before} == before
    assert after["ft"]["does_not_fit"] == "too large"
    assert bench.run_bench([*lines, "bench.offload=[cpu]"]) == 0
    assert measured == ["ft"]  # that it does not fit is known
    assert bench.run_bench([*lines, "bench.rows=[ft]", "bench.redo=true"]) == 0
    assert measured == ["ft", "ft"]


@pytest.mark.slow
def test_a_row_that_cannot_be_measured_says_so_and_the_rest_goes_on(monkeypatch, no_figure):
    whole = benchmark.build_subject

    def fail(row, *arguments, **settings):
        if row.label == "ft":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        if row.label == "ia3":
            raise SiteError("no such site")
        if row.label == "prompt":
            raise ZeroDivisionError("a mistake")
        return whole(row, *arguments, **settings)

    monkeypatch.setattr(benchmark, "build_subject", fail)
    lines = [*TINY, *QUICK, "bench.rows=[ft,ia3,prompt,floor,cola-mlp-unmerged-gpu]"]
    if torch.cuda.device_count() > 1:
        lines.append("bench.offload=[cpu]")
    assert bench.run_bench(lines) == 1
    rows = results_of(Path("outputs/bench/table10"))
    assert rows["ft"]["does_not_fit"] == "CUDA out of memory. Tried to allocate 2 GiB."
    assert rows["ia3"]["failed"] == "no such site"
    assert rows["prompt"]["failed"] == "a mistake"
    assert rows["floor"]["seconds"] > 0
    assert rows["cola-mlp-unmerged-gpu"]["skipped"] == "needs a second GPU"
    table = Path("outputs/bench/table10/table.md").read_text()
    assert "does not fit: CUDA out of memory" in table
    assert "needs a second GPU" in table


def test_memory_that_is_gone_is_found_below_what_a_worker_raises():
    wrapped = OffloadError("fitting site 'a' failed")
    wrapped.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 TB")
    assert limits.does_not_fit(wrapped)
    assert not limits.does_not_fit(OffloadError("the step is not finite"))


def test_only_rows_with_adapters_on_the_host_can_be_too_large_for_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shortage, "free_host_bytes", lambda: 10_000)
    assert bench.run_bench([*TINY, *QUICK, "bench.rows=[floor,lora,cola-mlp-unmerged-cpu]"]) == 0
    rows = results_of(Path("outputs/bench/table10"))
    assert rows["floor"]["seconds"] > 0
    assert rows["lora"]["seconds"] > 0
    assert "GiB of host memory" in rows["cola-mlp-unmerged-cpu"]["does_not_fit"]


@pytest.fixture
def free(monkeypatch):
    """Bytes that are free, by device, to be changed; enough of all at first."""
    found = dict.fromkeys(("cpu", "cuda:0", "cuda:1", "cuda:2"), 2**50)
    monkeypatch.setattr(shortage, "free_host_bytes", lambda: found["cpu"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found[str(device)], 2**50))
    others = OffloadPlan(devices=(torch.device("cuda", 1), torch.device("cuda", 2)))
    monkeypatch.setattr(shortage, "resolve_offload", lambda *args, **settings: others)
    return found


GPU = torch.device("cuda", 0)


def test_what_the_base_model_leaves_is_free_and_what_another_gpu_holds_does_not_count(free):
    row = rows_of(*TINY, *QUICK)["cola-linear-merged-cpu"]
    base, _ = build(row)
    memory = memory_plan.plan_memory(row.config, base, plan_adapters(row.config, base.sites))
    free["cpu"] = sum(memory["host"].values()) - memory_plan.weight_bytes(base)
    assert shortage.shortages(row.config, base, GPU) == []
    free["cpu"] -= 1
    (message,) = shortage.shortages(row.config, base, GPU)
    assert re.search(r"GiB of host memory .* use a smaller adapter, .* or offload=gpu$", message)
    elsewhere = dataclasses.replace(row.config.offload, name=OffloadTarget.gpu)
    free["cpu"] = -memory_plan.weight_bytes(base)
    on_gpu = dataclasses.replace(row.config, offload=elsewhere)
    assert shortage.shortages(on_gpu, base, GPU) == []


@pytest.mark.parametrize("name", ["none", "gpu"])
def test_gpus_have_to_hold_what_stays_there(free, name):
    row = rows_of(*TINY, *QUICK, "bench.offload=[none,gpu]")[f"cola-linear-unmerged-{name}"]
    base, _ = build(row)  # has yet to come to its GPU
    memory = memory_plan.plan_memory(row.config, base, plan_adapters(row.config, base.sites))
    elsewhere = sum(memory["host"].values()) if name == "gpu" else 0
    free["cuda:0"] = sum(memory["base"].values())
    free["cuda:1"], free["cuda:2"] = elsewhere // 2, elsewhere - elsewhere // 2
    assert shortage.shortages(row.config, base, GPU) == []
    free["cuda:2"] -= 1
    found = shortage.shortages(row.config, base, GPU)
    assert len(found) == (name == "gpu")
    assert all("GiB of cuda:1 and cuda:2 for adapters" in message for message in found)
    free["cuda:0"] -= 1
    (message,) = shortage.shortages(row.config, base, GPU)
    assert re.search(r"GiB of cuda:0 .* use a smaller adapter, .* or another offload$", message)
    assert shortage.shortages(row.config, base, torch.device("cpu")) == []


def test_a_base_model_that_is_on_its_gpu_is_not_asked_for_again(monkeypatch, free):
    row = rows_of(*TINY, *QUICK, "bench.offload=[none]")["cola-linear-unmerged-none"]
    base, _ = build(row)
    memory = memory_plan.plan_memory(row.config, base, plan_adapters(row.config, base.sites))
    weights = memory_plan.weight_bytes(base)
    for module in (memory_plan, shortage):
        monkeypatch.setattr(module, "weight_bytes", lambda base: weights)
    size = next(base.module.parameters()).element_size()
    there = SimpleNamespace(device=GPU, element_size=lambda: size)
    module = SimpleNamespace(parameters=lambda: iter([there]))
    moved = SimpleNamespace(module=module, sites=base.sites)
    free["cuda:0"] = sum(memory["base"].values()) - weights
    assert shortage.shortages(row.config, moved, GPU) == []
    free["cuda:0"] -= 1
    assert len(shortage.shortages(row.config, moved, GPU)) == 1


def test_a_row_that_a_gpu_cannot_hold_is_left_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "shortages", lambda *args: ["9.0 GiB of cuda:0"])
    assert bench.run_bench([*TINY, *QUICK, "bench.rows=[lora,cola-mlp-unmerged-cpu]"]) == 0
    rows = results_of(Path("outputs/bench/table10"))
    assert rows["lora"]["seconds"] > 0
    assert rows["cola-mlp-unmerged-cpu"]["does_not_fit"] == "9.0 GiB of cuda:0"


def test_files_that_a_container_has_read_are_free(monkeypatch, tmp_path):
    monkeypatch.setattr(shortage, "_CGROUP", tmp_path)
    available = psutil.virtual_memory()._replace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    assert shortage.free_host_bytes() == 10**6
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 300\ninactive_file 20\n")
    for limit, free in (("max", 10**6), ("6000", 1320), ("2000000", 10**6)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert shortage.free_host_bytes() == free


@pytest.mark.parametrize("label", ["floor", "lora", "cola-linear-merged-cpu"])
def test_subjects_leave_the_frozen_weights_as_they_were(label):
    row = rows_of(*TINY, *QUICK)[label]
    base, problem = build(row)
    before = {name: value.clone() for name, value in base.module.state_dict().items()}
    batches = build_batches(row, base, problem, RowLengths.full)
    subject = build_subject(row, base, problem.objective, iterations=3)
    for _ in range(3):
        subject.step(batches[0])
    subject.finish()
    assert subject.costs().base_seconds > 0
    subject.close()
    after = base.module.state_dict()
    kept = before.keys() & after.keys()
    assert len(kept) > len(before) / 2  # LoRA renames the layers that it wraps
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_the_floor_differentiates_every_hidden_representation_of_both_sides():
    row = rows_of("experiment=table11", "model=tiny-bart", "task.max_length=8")["floor"]
    base, problem = build(row)
    seen = []
    sites = [base.module.get_submodule(site) for site in base.sites]
    subject = build_subject(row, base, problem.objective, iterations=1)
    for site in sites:
        site.register_full_backward_hook(lambda module, *gradients: seen.append(module))
    subject.step(build_batches(row, base, problem, RowLengths.full)[0])
    assert set(seen) == set(sites)
    assert all(parameter.grad is None for parameter in base.module.parameters())


def test_slow_iterations_are_repeated_less_often(monkeypatch):
    class Slow:
        steps = 0

        def step(self, batch):
            self.steps += 1

        def finish(self):
            pass

        def costs(self):
            return measure.Measurements(held_bytes={"cpu": {"base_model": 1}})

    seconds = iter(range(0, 1000, 6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(seconds)))
    subject = Slow()
    found = measure.measure(subject, ["batch"], [torch.device("cpu")], warmup=3, iterations=10)
    assert found["iterations"] == measure.SLOW_ITERATIONS
    assert subject.steps == 2 + 2 * measure.SLOW_ITERATIONS + 1


def test_time_is_the_median_of_iterations_that_have_something_to_wait_for(monkeypatch):
    class Pipelined:
        """Its first step after an idle moment is free, and its fourth meets something else."""

        now, since_idle, work = 0.0, 0, 0.0

        def step(self, batch):
            self.now += [1.0, 6.0, 6.0, 30.0, 6.0, 5.0][self.since_idle]
            self.since_idle += 1
            self.work += 2.0

        def finish(self):
            self.now += 100.0
            self.since_idle = 0

        def costs(self):
            held = {"cpu": {"base_model": 1}}
            return measure.Measurements(stall_seconds=self.work, held_bytes=held)

    subject = Pipelined()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: subject.now)
    monkeypatch.setattr(measure, "SLOW_SECONDS", 1000.0)
    found = measure.measure(subject, ["batch"], [torch.device("cpu")], warmup=1, iterations=5)
    assert found["seconds"] == 6.0
    assert found["seconds_mean"] == pytest.approx((6 + 6 + 30 + 6 + 5) / 5)
    assert found["seconds_spread"] == [5.0, 30.0]
    assert found["stall_seconds"] == 2.0
    assert found["stall_share"] == pytest.approx(2 / 6)


def test_lengths_are_those_of_the_set_whatever_the_seed():
    assert row_lengths(RowLengths.full, 3, 128, seed=0) == [128] * 3
    cola = row_lengths(RowLengths.cola, 32, 128, seed=0)
    assert sum(cola) / (32 * 128) == pytest.approx(0.11, abs=0.01)  # as of the real set
    assert sorted(row_lengths(RowLengths.cola, 32, 128, seed=1)) == sorted(cola) != cola
    dolly = row_lengths(RowLengths.dolly, 8, 128, seed=0)
    assert max(dolly) == 128 > min(dolly)


def test_causal_rows_are_padded_on_the_left_and_score_their_end():
    row = rows_of("experiment=table12", "model=tiny-gpt2", "bench.batch_sizes=[4]")["floor"]
    base, problem = build(row)
    (batch,) = build_batches(row, base, problem, RowLengths.cola)
    mask, labels = batch.inputs["attention_mask"], batch.labels
    assert labels.shape == (4, 128)
    assert count_tokens(batch, problem) == (512, int(mask.sum()))
    assert not mask[:, 0].any()
    assert mask[:, -1].all()
    assert (batch.inputs["position_ids"].max(dim=1).values == mask.sum(dim=1) - 1).all()
    scored = (labels != IGNORED).sum(dim=1) / mask.sum(dim=1)
    assert scored.min() > 0.3
    assert scored.max() < 0.5
    assert batch.rows is None


@pytest.mark.parametrize(
    ("size", "users", "counts"),
    [
        (2, [(0, 1), (2, 3), (4, 5), (6, 7)], [(1, 1)] * 4),
        (3, [(0, 1, 2), (3, 4, 5), (5, 6, 7)], [(1, 1, 1)] * 3),
        (12, [tuple(range(8))], [(2, 2, 2, 2, 1, 1, 1, 1)]),
    ],
)
def test_users_share_the_batch_or_take_turns(size, users, counts):
    lines = ("experiment=table16", "model=tiny-gpt2", f"bench.batch_sizes=[{size}]")
    row = rows_of(*lines, "task.max_length=8")["cola-lowrank-unmerged-cpu"]
    base, problem = build(row)
    batches = build_batches(row, base, problem, RowLengths.full)
    assert [batch.rows.users for batch in batches] == users
    assert [batch.rows.counts for batch in batches] == counts


def measured(label: str, seconds: float, *, call: int = 0, **facts: object) -> dict:
    row = {"label": label, "seconds": seconds, "base_mib": 10 * seconds, "call": call}
    setting = {"machine": {}, "settings": [], "model": "m", "lengths": "full", "batch_size": 8}
    return {**row, **setting, **facts}


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ("lora", (50.0, 0.0)),
        ("cola-mlp-unmerged-none", (50.0, 10.0)),  # what adapters add where they stay
        ("cola-mlp-unmerged-cpu", (50.0, 6.0)),
        ("cola-mlp-unmerged-gpu", (50.0, 70.0)),
    ],
)
def test_memory_of_a_gpu_is_its_peak_and_of_the_host_what_is_held(label, wanted):
    held = {"cuda:0": {"base_model": 30.0, "adapters": 4.0}, "cpu": {"optimizer": 6.0}}
    peaks = {"cuda:0": 50.0} | ({"cuda:1": 70.0} if label.endswith("gpu") else {})
    found = {"held_mib": held, "peak_allocated_mib": peaks}
    memory = benchmark.memory_columns(rows_of(*TINY, *QUICK)[label], found, "cuda:0")
    assert (memory["base_mib"], memory["offload_mib"]) == wanted


def test_ratios_are_to_rows_of_the_same_setting_and_of_this_call_if_it_has_them():
    rows = [
        measured("lora", 2.0, call=0),
        measured("floor", 1.0, call=0),
        measured("floor", 3.0, call=1, batch_size=1),
        measured("cola", 1.5, call=1),
        measured("lora", 4.0, call=1, lengths="cola"),
    ]
    add_ratios(rows)
    assert rows[3]["ratios"] == {
        "lora": {"seconds": 0.75, "base_mib": 0.75, "same_call": False},
        "floor": {"seconds": 1.5, "base_mib": 1.5, "same_call": False},
    }
    assert rows[0]["ratios"]["lora"]["same_call"]


def test_the_papers_values_stand_beside_ours(finished, tmp_path):
    row = results_of(finished)["cola-lowrank-merged-cpu"]
    twin = {**row, "model": "roberta-base", "batch_size": 8, "dtype": "float32"}
    line = next(ln for ln in cost_table([twin]).splitlines() if ln.startswith("| cola-"))
    # Table 10, batch size 8: 0.146 s, 0.003 s an adapter, 1.6 GB and 5.2 MB.
    for cell in ("(146)", "(3)", "(1,638.4)", "(5.2)"):
        assert cell in line
    skipped = {**twin, "label": "x", "skipped": "needs a second GPU"}
    skipped.pop("seconds")
    assert "| needs a second GPU |" in cost_table([skipped])
    assert not plot_costs([skipped], tmp_path / "none.png").exists()


def test_a_figure_keeps_settings_apart_and_names_them(finished):
    row = {**results_of(finished)["cola-lowrank-merged-cpu"], "settings": []}
    figure = draw_costs([row, {**row, "settings": ["offload.payload=auto"]}])
    plain, other = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert other == f"{plain}, offload.payload=auto"


def test_regression_and_images_have_batches_of_their_own():
    glue = ("experiment=table10", "model=tiny-roberta", "task.subset=stsb", *QUICK)
    row = rows_of(*glue)["floor"]
    base, problem = build(row)
    (batch,) = build_batches(row, base, problem, RowLengths.full)
    assert problem.objective is Objective.regression
    assert batch.labels.dtype is torch.float32
    images = rows_of("experiment=table15", "model=cnn", *QUICK)["floor"]
    base, problem = build(images)
    (batch,) = build_batches(images, base, problem, RowLengths.full)
    assert batch.inputs["pixels"].shape == (2, 1, 28, 28)
    assert count_tokens(batch, problem) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("table", [10, 11, 12, 13, 14, 15, 16, 17, 18])
def test_every_row_of_every_table_runs_on_a_tiny_model(table):
    model = {10: "tiny-roberta", 11: "tiny-bart", 12: "tiny-gpt2", 16: "tiny-gpt2"}
    lines = [f"experiment=table{table}", *QUICK, "bench.lengths=dolly", "device=cpu"]
    if table != 15:
        lines += [f"model={model.get(table, 'tiny-llama')}", "task.max_length=16"]
    assert bench.run_bench([*lines, "bench.offload=[none,cpu]"]) == 0
    rows = results_of(Path(f"outputs/bench/table{table}"))
    assert all(row["seconds"] > 0 for row in rows.values())


def test_settings_that_measure_otherwise_take_the_place_of_a_row(tmp_path):
    row = rows_of(*TINY, *QUICK)["floor"]
    for iterations in (2, 3):
        config = BenchConfig(iterations=iterations)
        results = benchmark.Results(tmp_path, config, ["cola-bench", "experiment=table10"])
        assert not results.has(row)
        results.put(row, {**row.facts(config), "does_not_fit": "x"})
        assert results.has(row)
        assert len(results.rows) == 1
    other = dataclasses.replace(config, lengths=RowLengths.cola)
    assert not benchmark.Results(tmp_path, other, ["cola-bench"]).has(row)
