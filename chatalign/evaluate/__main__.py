"""``python -m chatalign.evaluate RECIPE``."""

from chatalign.evaluate import main

if __name__ == "__main__":
    main()
