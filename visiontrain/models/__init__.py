"""Networks, each a graph of named blocks."""
