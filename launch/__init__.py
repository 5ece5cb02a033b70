"""Programs and scripts that prepare a machine, start runs and check the ranks."""
