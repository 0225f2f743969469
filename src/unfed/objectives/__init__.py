"""Training and unlearning objectives: pure functions of log-probabilities, one paper a file."""
