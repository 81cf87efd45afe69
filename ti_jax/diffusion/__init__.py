"""Noise schedule and samplers: pure functions, nothing of the networks."""
