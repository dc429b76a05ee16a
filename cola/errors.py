"""One hierarchy of errors, each also the built-in class a caller would expect.

A message says what was given, what is allowed and what to change. All are picklable: the arguments
are the message alone, since workers send errors back across threads and processes.
"""


class ColaError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(ColaError, ValueError):
    """A configuration that cannot run: unknown name, wrong type, impossible combination."""


class DataError(ColaError, ValueError):
    """A data set that is missing or cannot be read; names the file and line."""


class SiteError(ColaError, ValueError):
    """A site that cannot be tapped: no match, unsupported module, never ran, shared weight."""


class OffloadError(ColaError, RuntimeError):
    """A worker that failed; carries its traceback, or the step and site of a bad gradient."""


class MergeError(ColaError, RuntimeError):
    """A merge that is impossible: the adapter is not linear in its input."""


class TrainingError(ColaError, RuntimeError):
    """A run that cannot go on: the loss is no longer a number."""
