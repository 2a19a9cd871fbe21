"""Environments of others as harnesses: each module is a program for ``--harness``."""
