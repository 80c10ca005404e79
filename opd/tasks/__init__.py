"""Embedded reasoning tasks: generated questions, exact verifiers, privileged hints."""

from opd.tasks.expr import EXPR
from opd.tasks.route import ROUTE
from opd.tasks.types import HINT_TEMPLATES, Task
from opd.tasks.words import WORDS

__all__ = ["HINT_TEMPLATES", "TASKS", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (EXPR, ROUTE, WORDS)}
