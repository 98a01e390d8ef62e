"""The parts of the data plane that do no I/O."""
