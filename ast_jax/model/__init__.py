"""Arrays to arrays: attention, Flax modules, the pure functions `init`, `apply` and `encode`, and losses."""
