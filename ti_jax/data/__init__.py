"""Training data: the pictures and prompts that a word is learned from."""
