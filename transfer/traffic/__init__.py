"""Traffic classes: who sends what in which, and what it takes on each kind of network."""
