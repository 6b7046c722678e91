"""`python -m attnconv`: the same as the `attnconv` command."""

from .cli import main

if __name__ == "__main__":
    main()
