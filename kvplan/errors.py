"""What can go wrong, as a tree. The CLI prints each of these as one line and exits with its code.

KVPlanError (2: usage or configuration)
├── PolicyError      a policy file or object breaks a rule
├── ModelError       a model cannot be used, or is not the one that a file was made for
├── DataError        prompts are missing, empty or malformed
├── MethodError      a method's parameters make no sense, or its name is unknown
├── TargetError      a memory target cannot be met
├── ProfileError     a profile cannot be read or merged, or belongs to something else
├── ConfigError      kvplan.toml says something that cannot be
├── StudyError       a study cannot be created or resumed
├── ResultsError     a results file cannot be read
│   └── NotComparableError (4)  of another model, of other prompts, or of another format
└── RuntimeLimitError  the runtime was asked for something that it cannot do correctly
MemoryPlanExceeded (1)   measured bytes above the plan: a finding, not a usage error
"""

from __future__ import annotations

MAX_CHARACTERS = 1000  # of a line; what is longer quotes a whole file


class KVPlanError(ValueError):
    """Base of every error that a user can cause or fix: a line that a terminal shows and does not obey."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(map(_shown, lines)))


class PolicyError(KVPlanError):
    """A policy breaks a rule. `problems` holds every one found, a line each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [_shown(p) for p in ([problems] if isinstance(problems, str) else problems)]
        super().__init__(*self.problems)


class ModelError(KVPlanError):
    """A model cannot be loaded or used, or is another than expected."""


class DataError(KVPlanError):
    """Prompts are missing, empty or malformed."""


class MethodError(KVPlanError):
    """An unknown method name, or parameters that make no sense."""


class TargetError(KVPlanError):
    """A memory target cannot be met."""


class ProfileError(KVPlanError):
    """A profile cannot be read or merged, or belongs to another model."""


class ConfigError(KVPlanError):
    """kvplan.toml cannot be read, or names what does not exist."""


class StudyError(KVPlanError):
    """A study cannot be created or resumed."""


class ResultsError(KVPlanError):
    """A results file cannot be read, or lacks what is asked of it."""


class NotComparableError(ResultsError):
    """Results of another model, of other prompts or of another format."""

    exit_code = 4


class RuntimeLimitError(KVPlanError):
    """The runtime was asked for something that it cannot do correctly."""


class MemoryPlanExceeded(KVPlanError):
    """Measured bytes are above the planned ones."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of a device. Told by name and text: no torch here, and on a CPU torch has no class for it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _shown(line: str) -> str:
    """Parts of it come from files, so they may hold anything; a surrogate could not even be printed."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 205]} ... {text[-200:]}"
