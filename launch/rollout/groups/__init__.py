"""A prompt's samples as one group: begun together, judged together, written together."""
