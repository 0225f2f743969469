"""Pages and pictures that a person can read."""
