"""What a compile has written, in use: run on texts, timed, and compared on rows with labels."""
