"""What is wrong with a cluster before it shows: facts, rules over them, and how findings are told."""
