"""The command line, `apollo-ipc`. One module a family of commands; none imports torch or vLLM."""
