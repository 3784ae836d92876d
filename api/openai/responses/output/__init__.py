"""The items that a response consists of, and the events that stream them."""
