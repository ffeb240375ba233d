"""Errors that a user can mend: each message is one line that says what, where and how to mend it."""

from __future__ import annotations


class KronlabError(Exception):
    """Base of every error that kronlab raises on purpose."""


class ConfigError(KronlabError, ValueError):
    """A setting is wrong: unknown, out of range, or in conflict with another."""


class DataError(KronlabError):
    """A dataset is missing, unreachable or malformed."""


class ModelError(KronlabError):
    """A base model cannot be found, built or loaded."""


class CheckpointError(KronlabError):
    """A checkpoint is missing, incomplete, or does not fit the model."""


class DimensionError(ConfigError):
    """A component dimension does not divide the layer dimension that it should split."""


class Busy(KronlabError):
    """Another process is doing this work now; it is not to be done twice, and nothing has failed."""
