"""Commands that run without a worker, or beside one."""
