"""The harness of EleutherAI (`lm_eval`) on a model in memory: its own tasks, with its data or with files that are here.

Prompts, metrics and few-shot rules are the harness's. What this package adds is the model, the rows of local files in
the fields that a task of the harness reads, and errors that say what to do. `lm_eval` is an optional dependency (the
extra `eval`), and imported when a task is run.
"""

from __future__ import annotations
