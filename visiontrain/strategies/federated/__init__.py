"""Federated training: clients keep their data, only updates travel."""
