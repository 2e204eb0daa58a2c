"""The errors that users see, with their exit codes.

Every error that we raise on purpose descends from one base, for which the command line prints one clear line. Anything
outside of this tree is a bug and keeps its traceback.

    GrpoError                   exit 1   the job failed
    ├── UserError               exit 2   the request cannot be done; says what, where, and what to do
    │   ├── ConfigError                  unknown key, value of the wrong type, impossible combination
    │   │   └── PluginError              a user's own function or class raises, or returns nonsense
    │   ├── DataError                    a file or a row of it; names the file and the line
    │   ├── ModelError                   a model that cannot be found or loaded, a prompt beyond its context
    │   ├── RunDirError                  a run directory that exists, or belongs to another config
    │   ├── CheckpointError              a checkpoint that is damaged or of another model
    │   ├── RefusedError                 what a training service refuses, in its own words
    │   ├── DiskError                    the disk is full or cannot be written
    │   └── NonFiniteError               a loss or gradient that is not a number; the batch was kept
    ├── EngineError             exit 1   a sampling or evaluating process that fails again and again, or that
    │   │                                does not hold the weights it was given; checkpoints are good
    │   ├── ServiceError                 a training service that cannot be reached, or fails
    │   └── JudgeError                   a judge that cannot be reached, answers nonsense, or has no budget left
    ├── LaunchError             exit 1   a rented machine that could not be had, was lost, or whose job failed
    └── Interrupted             exit 130 Ctrl-C (143 on SIGTERM); a checkpoint was written first
"""

from __future__ import annotations

from pathlib import Path


class GrpoError(Exception):
    """The base of the tree in this module's docstring."""

    exit_code = 1


class UserError(GrpoError):
    """The request cannot be done, and the user can fix that."""

    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a value of the wrong type, or an impossible combination."""


class PluginError(ConfigError):
    """A user's own reward, loss, advantage, task or sampler raises, returns nonsense, or does not return."""


class DataError(UserError):
    """A data file or one of its rows is unusable.

    Args:
        path: the file.
        what: what is wrong, and what to do about it.
        line: 1-based line number, where the fault is in one row.
    """

    def __init__(self, path: Path | str, what: str, line: int | None = None) -> None:
        self.path, self.what, self.line = Path(path), what, line
        super().__init__(f"{path}:{line}: {what}" if line is not None else f"{path}: {what}")


class ModelError(UserError):
    """A model that cannot be found or loaded, or a prompt that does not fit into its context."""


class RunDirError(UserError):
    """A run directory that exists already, or that belongs to another config."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that belongs to another model or config."""


class RefusedError(UserError):
    """A training service refuses a request, and says what to change."""


class DiskError(UserError):
    """The disk is full or cannot be written; complete files are untouched."""


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite. Raised before the optimizer steps."""


class EngineError(GrpoError):
    """An engine process fails again and again, or does not sample from the weights that it was given."""


class ServiceError(EngineError):
    """A training service cannot be reached, or fails at what it accepted; its checkpoints are good."""


class JudgeError(EngineError):
    """A judge of answers cannot be reached, answers what is no verdict, or has used up its budget."""


class LaunchError(GrpoError):
    """A rented machine could not be had, was lost, or its job failed; what it cost has been said."""


class Interrupted(GrpoError):
    """SIGINT (exit 130) or SIGTERM (exit 143) arrived, and a checkpoint was written."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
