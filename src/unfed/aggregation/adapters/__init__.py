"""How the clients' LoRA factors become one adapter: one rule a file."""
