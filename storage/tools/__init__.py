"""What an operator does with a store from outside: ``python -m storage.cli``."""
