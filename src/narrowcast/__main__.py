"""``python -m narrowcast`` is the command line, as torchrun starts it."""

from narrowcast.cli.app import main

if __name__ == "__main__":
    main()
