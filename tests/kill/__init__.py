"""Kill every command at every file-system event, give it again, and compare: `python -m tests.kill`."""
