"""What goes over the socket, and the client that sends it."""
