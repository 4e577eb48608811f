"""`python -m flashvaed_cli`, and the console script."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from flashvaed_cli.cli.app import main as run_program

    run_program()


if __name__ == "__main__":
    main()
