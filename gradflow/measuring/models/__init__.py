"""Models of a user's own, and of libraries: built, called and measured as they are."""
