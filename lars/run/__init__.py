"""A run on disk: its folder, its checkpoints, and how it resumes."""
