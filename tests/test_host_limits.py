"""The script that measures what a host allows linear adapters."""

import json
import sys

import pytest
import torch

from scripts import host_limits

TINY = ["model=tiny-llama", "--batch-size", "2"]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["host_limits.py", *arguments])
    return host_limits.main()


def test_limits_are_sums_over_all_sites(monkeypatch, tmp_path, capsys):
    asked = []

    def parts(shape, num_rows, config):
        asked.append((shape, num_rows))
        return {"product": 4.0, "conversion": 3.0, "step": 2.0, "merge": 1.0}

    monkeypatch.setattr(host_limits, "host_parts", parts)
    assert call(monkeypatch, *TINY, "--seconds", "280", "--json", str(tmp_path / "out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["sites"] == {"64x64": 4, "32x64": 4, "128x64": 4, "64x128": 2}
    assert asked == [((64, 64), 256), ((32, 64), 256), ((128, 64), 256), ((64, 128), 256)]
    assert found["host_limit_seconds"] == {"factors": 14 * 10.0, "gradient": 14 * 3.0}
    assert found["parameters"] == 4 * 64 * 64 + 4 * 32 * 64 + 6 * 128 * 64
    assert found["limit_seconds"] == found["host_limit_seconds"]  # no GPU, no wire
    factors = next(line for line in capsys.readouterr().out.splitlines() if "factors" in line)
    assert factors.split("|")[2:5] == [" 140.000 ", "     nan ", "             2.00 "]


def test_every_part_takes_time(monkeypatch):
    config = host_limits.compose(["model=tiny-llama"], 2)
    monkeypatch.setattr(host_limits, "ROUNDS", 1)
    found = host_limits.host_parts((64, 64), 32, config)
    assert found.keys() == {"product", "conversion", "step", "merge"}
    assert all(seconds > 0 for seconds in found.values())


def test_workers_share_a_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    made = []

    def make():
        made.append(torch.get_num_threads)
        return lambda: None

    assert host_limits.on_all_cores(make) > 0
    assert len(made) == 2  # of two cores each


def test_a_worker_without_memory_ends_the_measurement():
    def make():
        raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory left"):
        host_limits.on_all_cores(make)


@pytest.mark.parametrize("mistake", ["no_such_key=tiny-llama", "merge=unmerged", "adapter=lowrank"])
def test_a_bad_command_line_is_one_message(monkeypatch, capsys, mistake):
    assert call(monkeypatch, mistake, *TINY[1:]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
