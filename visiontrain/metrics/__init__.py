"""Scores, exact and independent of the order of images."""
