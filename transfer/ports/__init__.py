"""Ports that processes of a cluster listen on: who is heard there, and which there are."""
