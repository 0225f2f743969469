"""Server rules: how the clients' adapters become the next global adapter."""
