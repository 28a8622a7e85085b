"""What to forget and what to retain -> tokenized clean/corrupt prompts."""
