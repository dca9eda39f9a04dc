"""Every fault that a training run must survive, brought about for real: ``cd tests && python -m faults``."""
