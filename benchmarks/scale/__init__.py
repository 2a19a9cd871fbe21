"""What one core can carry of the paper's workload, by unit costs in CPU time."""
