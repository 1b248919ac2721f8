"""What takes long, told to whoever watches and to the loggers `adaptc.*`."""
