"""The node's agent: reads shares, delivers blocks into engines, pulls blocks out of them."""
