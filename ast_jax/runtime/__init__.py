"""The machine: whole files, threads, signals, progress bars and figures. Nothing here knows of sound."""
