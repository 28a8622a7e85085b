"""From edge scores to a circuit: how faithful it is, and the search for a small one."""
