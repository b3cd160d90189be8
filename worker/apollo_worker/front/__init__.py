"""The process that answers: the socket, admission, and the trainer as its child."""
