"""`python -m adaptc`: the command line."""

from adaptc.cli.app import start

if __name__ == "__main__":
    start()
