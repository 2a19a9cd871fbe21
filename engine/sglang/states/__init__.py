"""States of recurrent layers: their pool, and the moments at which snapshots are taken."""
