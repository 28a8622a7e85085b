"""One run end to end: its settings, folder, cost and report."""
