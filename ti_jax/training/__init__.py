"""Learning a word: the step, its mapping over devices, and the loop around it."""
