"""What a model is trained for, one file a task: which data it takes, how a row becomes inputs, and what is measured.

These modules are light: transformers and its collators are imported when a task is put to work.
"""

from quadapt.tasks.base import TASKS, Asking, Data, Measured, Reading, Task, task_of

__all__ = ["TASKS", "Asking", "Data", "Measured", "Reading", "Task", "task_of"]
