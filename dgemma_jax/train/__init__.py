"""Training of the embedded organisms: language, tasks, loss and loop."""
