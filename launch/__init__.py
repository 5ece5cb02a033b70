"""Setting up, starting and checking runs: the scripts and programs that know about the machine."""
