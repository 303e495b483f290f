"""Train, validate and use object detectors on one device or many, with the same step."""
