"""Scores of a learned word: identity (is it the concept?) and editability (are prompts still followed?)."""
