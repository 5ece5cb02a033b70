"""A job from its start to its end: joining the other ranks, signals, stalls, errors."""
