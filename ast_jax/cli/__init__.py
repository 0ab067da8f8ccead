"""The command line `ast-jax`: parsing and messages only."""
