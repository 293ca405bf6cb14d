"""One file per command: parse, call, print. Torch, pandas and charts load inside the commands."""
