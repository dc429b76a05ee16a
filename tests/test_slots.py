"""Where the jobs of a parallel sweep run: devices, how many on each, what their processes see."""

import types

import psutil
import pytest

from cola.cli import slots
from cola.cli.slots import SlotSettings, plan_slots
from cola.errors import ConfigError

CORES = 16


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr(slots, "cpu_count", lambda: CORES)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer_with(monkeypatch, [])


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs with 80 and 30 GiB free."""
    answer_with(monkeypatch, [80.0, 30.0])


def answer_with(monkeypatch, free_gib):
    answers = {slots._num_gpus: len(free_gib), slots._free_gib: free_gib}
    monkeypatch.setattr(slots, "_in_spare_process", answers.__getitem__)


def plan(num_jobs=100, given_device=None, **settings):
    chosen = {"jobs": None, "devices": "auto", "jobs_per_device": None, "memory_gib": None}
    return plan_slots(
        SlotSettings(**(chosen | settings)), num_jobs=num_jobs, given_device=given_device
    )


def devices(*arguments, **settings):
    return [slot.device for slot in plan(*arguments, **settings)]


def test_cores_without_gpus():
    assert devices() == ["cpu"] * CORES
    assert devices(jobs=3) == ["cpu"] * 3
    assert devices(2) == ["cpu"] * 2


@pytest.mark.usefixtures("gpus")
def test_every_gpu_takes_one_job_or_as_many_as_asked_for():
    assert devices() == ["cuda:0", "cuda:1"]
    assert devices(jobs_per_device=2) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert devices(jobs_per_device=2, jobs=3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices(1) == ["cuda:0"]
    assert devices(devices=["cuda:1"]) == devices(devices="cuda:1") == ["cuda:1"]


@pytest.mark.usefixtures("gpus")
def test_gpus_are_shared_by_free_memory():
    assert devices(memory_gib=25) == ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]
    with pytest.raises(ConfigError, match=r"memory_gib=40: cuda:1 has 30.0 GiB free; free some"):
        plan(memory_gib=40)
    assert devices(memory_gib=40, devices=["cuda:0"]) == ["cuda:0", "cuda:0"]


def test_cpu_is_shared_by_memory(monkeypatch):
    memory = types.SimpleNamespace(available=50 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert devices(memory_gib=12) == ["cpu"] * 4


@pytest.mark.usefixtures("gpus")
def test_process_sees_its_gpu_alone():
    environments = [slot.environment for slot in plan(jobs_per_device=2)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments] == ["0", "1", "0", "1"]
    assert {one["OMP_NUM_THREADS"] for one in environments} == {"4"}
    assert plan(devices="cpu")[0].environment["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.usefixtures("gpus")
def test_gpus_count_among_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f")
    seen = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in plan()]
    assert seen == ["5", "GPU-7f"]


def test_threads_that_the_user_set_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert plan(jobs=4)[0].environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.usefixtures("gpus")
def test_device_of_the_command_line_is_left_alone():
    found = plan(given_device="cuda:1", jobs=2)
    assert [slot.device for slot in found] == ["cuda:1", "cuda:1"]
    assert all("CUDA_VISIBLE_DEVICES" not in slot.environment for slot in found)
    assert len(plan(given_device="cuda:1")) == 1
    assert len(plan(given_device="cpu")) == CORES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": 0}, r"hydra\.launcher\.jobs=0: must be positive; or leave it out"),
        ({"memory_gib": -1.0}, r"hydra\.launcher\.memory_gib=-1\.0: must be positive"),
        (
            {"jobs_per_device": 2, "memory_gib": 8.0},
            r"jobs_per_device=2 and hydra\.launcher\.memory_gib=8\.0: both say how many",
        ),
        (
            {"devices": ["cuda:0", "cuda:2"]},
            r"no 'cuda:2'; give auto, cpu, or a list of GPUs \(cuda:0, cuda:1\)",
        ),
        ({"devices": "gpu"}, r"no 'gpu'; give auto, cpu, or a list of GPUs"),
        (
            {"devices": ["cuda:0"], "given_device": "cuda:1"},
            r"device=cuda:1 and hydra\.launcher\.devices: both say where jobs run; give one",
        ),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_setting_that_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan(**settings)


def test_gpu_on_a_machine_without():
    with pytest.raises(ConfigError, match=r"no 'cuda:0'; give .* \(it has none\)"):
        plan(devices=["cuda:0"])
