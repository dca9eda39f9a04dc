"""``python -m ultrazoo`` is the command ``ultrazoo``."""

from ultrazoo.cli import main

if __name__ == "__main__":
    main()
