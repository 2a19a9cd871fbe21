"""One command that serves a model: configuration, processes, supervisor."""
