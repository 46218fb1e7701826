"""Text in, packed windows out, and the order in which training sees them."""
