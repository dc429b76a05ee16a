"""Stands in for the Weights & Biases library; remembers what it was given."""

import os
import sys
import types

import pytest


class WandbError(Exception):
    """Base class of the library's own errors."""


class FakeRun:
    def __init__(self) -> None:
        self.logged, self.summary, self.defined, self.is_finished = [], {}, {}, False
        self.error: Exception | None = None

    def log(self, values):
        if self.error is not None:
            raise self.error
        self.logged.append(values)

    def define_metric(self, name, **settings):
        self.defined[name] = settings

    def finish(self):
        self.is_finished = True


def clean(monkeypatch, home):
    """No key and no mode anywhere."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))


def install(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The library as it is imported from now on."""
    module = types.ModuleType("wandb")
    module.started, module.run, module.error = [], FakeRun(), None

    def init(**settings):
        if module.error is not None:
            raise module.error
        module.started.append(settings)
        return module.run

    module.init = init
    module.Error = WandbError
    module.Settings = dict
    module.Image = lambda path: f"image of {path}"
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module
