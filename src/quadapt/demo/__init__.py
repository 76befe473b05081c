"""The embedded demonstration: a small model, the task that it is tuned for, and the commands that show both."""
