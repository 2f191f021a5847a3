"""The data sets of the papers. A new one is an entry of the ``TASKS`` of its module."""

from credence.training.errors import ConfigError
from credence.training.tasks import choices, generation, sentences
from credence.training.tasks.base import Task
from credence.training.tasks.prepare import Prepared, prepare

TASKS: dict[str, Task] = {task.name: task for task in (*choices.TASKS, *sentences.TASKS, *generation.TASKS)}


def task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; allowed: {', '.join(TASKS)}", key="task")
    return TASKS[name]


__all__ = ["TASKS", "Prepared", "Task", "prepare", "task"]
