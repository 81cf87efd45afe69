"""Operations that differ by platform: each has the implementation that is fastest on a CPU, a TPU or a GPU."""
