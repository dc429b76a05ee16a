"""Collaborative Adaptation with Gradient Learning (arXiv 2404.13844) as an experiment runner."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cola")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
