"""Many cells: which are measured where, and timed in turn."""
