"""The life of machines that have a driver: what starts, stops and suspends them, and when."""
