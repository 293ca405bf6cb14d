"""The HTML page and its charts, made from stored runs."""
