"""What a word is learned from: pictures and prompts."""
