"""The border: all that is called, read or replaced of SGLang."""
