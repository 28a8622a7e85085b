"""What single heads do: where they look and why, what they write, their role."""
