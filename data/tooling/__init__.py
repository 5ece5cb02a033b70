"""What the data tools share: flags and exit codes, process pools, atomic files."""
