"""The command line: the commands, the screen they print on, and the first spec that `adaptc init` writes.

Each command imports what it needs when it runs, so that `adaptc --help` does not wait for torch.
"""
