"""What a run will cost, and what the original knows, said before it starts."""
