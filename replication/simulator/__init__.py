"""Many replicas in one process and in virtual time, from one seed, with faults and checkers."""
