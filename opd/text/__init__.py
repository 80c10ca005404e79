"""Messages, texts and tokens."""
