"""Parameter servers: workers push gradients, servers hold weights and optimizer."""
