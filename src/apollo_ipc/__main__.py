"""`python -m apollo_ipc` is `apollo-ipc`."""

from apollo_ipc.cli.main import main

main()
