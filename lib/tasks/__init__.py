"""Built-in tasks: `lib.tasks.<name>_task` exposes `TASK_SPEC`."""
