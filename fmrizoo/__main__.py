"""``python -m fmrizoo``, for launchers that start modules (torchrun, deepspeed)."""

from fmrizoo.cli import main

if __name__ == "__main__":
    main()
