"""One file per kind of task; the file's name is the task's name in a recipe."""
