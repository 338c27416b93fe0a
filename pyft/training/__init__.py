"""The training run: settings, stages, schedules, losses, the loop, and checkpoints that resume bit for bit."""
