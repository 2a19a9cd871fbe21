"""A URL for each episode, at which whatever agent is run records what it is trained on."""
