"""Training modes: where gradients are summed, who applies them, who drives the run."""
