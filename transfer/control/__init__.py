"""Control connections: zmq sockets whose two ends know each other, and who may send what."""
