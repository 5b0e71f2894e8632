"""The family of errors that accrete raises on purpose.

Each message says where, what was given, what is allowed and what to do next. The command line
prints the message alone (no traceback) and exits with `exit_code`.
"""

from __future__ import annotations


class AccreteError(Exception):
    """Something accrete could not do; the message is written for the user."""

    exit_code = 1


class InputError(AccreteError):
    """Bad input: nothing was started and no run folder is left behind."""

    exit_code = 2


class ConfigError(InputError):
    """One or more mistakes in a recipe or an override; the message lists all of them."""


class DataError(InputError):
    """A task's rows cannot be used; the message names file and line."""


class ModelError(InputError):
    """A model, tokenizer or adapter setting that cannot work."""


class RunFolderError(InputError):
    """A run folder that is missing, taken, locked or not what the command expects."""


class CheckpointError(AccreteError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class DistributedError(AccreteError):
    """The process group or the engine is not what the run needs."""


class MethodError(AccreteError):
    """A method was asked for something it cannot do."""
