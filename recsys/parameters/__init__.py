"""The trainer's parameters on their way to ranking: deltas, the serving copy that they keep up to date, and how rows are read from it."""
