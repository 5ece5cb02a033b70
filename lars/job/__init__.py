"""A job from start to end: joining the other ranks, signals, stalled ranks, errors."""
