"""`python -m adaptc`: the command line."""

from adaptc.cli.app import start

start()
