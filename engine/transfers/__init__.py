"""What agents move for an engine: deliveries, jobs, the board, pages held."""
