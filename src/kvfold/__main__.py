"""``python -m kvfold``: the same as the command ``kvfold``."""

from kvfold.cli import main

if __name__ == "__main__":
    main()
