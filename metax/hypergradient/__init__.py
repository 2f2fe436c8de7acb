"""Learning rates that learn themselves while the model trains."""
