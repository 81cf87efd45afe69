"""What differs by platform: each operation in the form that a CPU, a TPU or a GPU runs fastest."""
