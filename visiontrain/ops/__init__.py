"""Pure functions on tensors: boxes, assignment, losses."""
