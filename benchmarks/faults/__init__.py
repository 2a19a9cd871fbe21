"""Faults at random on a whole cluster: docs/results_faults.md."""
