"""Who starts the processes: one launcher a file, all from the same config."""
