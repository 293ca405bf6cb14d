"""The theory of schemes that carry several streams."""
