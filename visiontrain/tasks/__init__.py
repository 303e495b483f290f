"""What is learned: loss, decoding and evaluation of a task."""
