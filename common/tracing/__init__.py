"""Traces: what became of a request in each process, told to an OpenTelemetry collector."""
