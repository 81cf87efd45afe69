"""Scores of what a learned word draws: is the concept there, and does the prompt still rule the rest?"""
