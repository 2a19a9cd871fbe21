"""Every message that crosses a process boundary: a module for each sender, and one codec.

Servers (agents and engines) bind a zmq ROUTER; their clients connect with a DEALER. Numbers that
name things are never reused: the gateway numbers a *plan*, an engine the *job* that it issues (both
48 bits). Agents and engines carry an *incarnation*, the start time of their process in ms: a
greater one replaces all that came before it. Who may send which message:
:mod:`transfer.control.senders`.
"""
