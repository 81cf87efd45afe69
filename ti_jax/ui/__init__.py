"""`ti-jax ui`: a page in the browser to learn words with, try them and save them."""
