"""`python -m pyft` is the command `pyft`."""

from pyft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
