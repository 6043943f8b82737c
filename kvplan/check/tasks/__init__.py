"""Tasks that are generated offline. A new one is a file here and an import line below."""

from kvplan.check.tasks import (
    aggregation,
    continuation,
    copying,
    few_shot,
    multi_turn,
    niah,
    niah_multikey,
    passkey,
    variable_tracking,
)
from kvplan.check.tasks.base import Task, tasks
from kvplan.check.tasks.build import generated

__all__ = [
    "Task",
    "aggregation",
    "continuation",
    "copying",
    "few_shot",
    "generated",
    "multi_turn",
    "niah",
    "niah_multikey",
    "passkey",
    "tasks",
    "variable_tracking",
]
