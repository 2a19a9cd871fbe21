"""Pure policy: cluster state, directory, plans. No I/O, no clock of its own."""
