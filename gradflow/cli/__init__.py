"""The command line: the app, its options, one file per command.

Torch, pandas and charts load inside the commands.
"""
