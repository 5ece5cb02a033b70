"""From samples to batches: the order, worker processes, DALI, and copies to a GPU."""
