"""Speed comparisons: a registry of ops, one driver, and ``pytest bench/``."""
