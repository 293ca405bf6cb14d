"""All seeds of a narrow stack in one pass."""
