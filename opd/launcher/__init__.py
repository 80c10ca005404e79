"""The launcher of a run with several processes, and its ranks."""
