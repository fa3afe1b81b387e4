"""One tree of errors. Each says what is wrong, where, and how to mend it, in one line.

The command line prints that line and exits with status 2; ``--traceback`` shows the rest.
"""

from __future__ import annotations


class ChatalignError(Exception):
    """The root: anything that chatalign refuses, with a message for the person at the keyboard."""


class RecipeError(ChatalignError, ValueError):
    """A recipe that can't be read, or holds an unknown key, a wrong value or a contradiction."""


class DataError(ChatalignError, ValueError):
    """A data file or a row that can't be trained on."""


class TemplateError(ChatalignError, ValueError):
    """A chat template that is missing, or can't give an exact supervision mask."""


class ModelError(ChatalignError, ValueError):
    """A model, tokenizer or adapter folder that can't be used as the recipe asks."""


class ArtifactError(ChatalignError, ValueError):
    """A run folder whose ``artifact.json`` is missing, unreadable or doesn't match its files."""


class CheckpointError(ChatalignError, ValueError):
    """A checkpoint that is incomplete, altered, or of another run."""


class OtherRunError(CheckpointError):
    """A checkpoint that another run wrote; never skipped, since the folder itself is then wrong."""


class ChangedRunError(ChatalignError, ValueError):
    """An unfinished run that is asked for with another recipe, data, model or number of processes than before."""


class NonFiniteError(ChatalignError, ArithmeticError):
    """A loss, reward or gradient that is NaN or infinite; the run stops here."""


class GuardError(ChatalignError, RuntimeError):
    """A run that would go on and be wrong: a promise that the guard holds at start or at a step is broken."""


class DependencyError(ChatalignError, ImportError):
    """An optional package that the recipe needs and that isn't installed."""


class HubError(ChatalignError, ConnectionError):
    """The Hub refused or couldn't be reached; nothing local was lost."""


class RolloutError(ChatalignError, ConnectionError):
    """vLLM couldn't be reached, refused, or answered something that PPO can't learn from."""


class Interrupted(ChatalignError, RuntimeError):
    """Stopped by a signal after a checkpoint was saved; the message says how to go on."""


class StageStopped(Interrupted):
    """One stage alone was stopped, by its time budget or a signal to it; a chain goes on with what doesn't need it."""
