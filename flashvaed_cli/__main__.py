"""`python -m flashvaed_cli`, and the console script."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line."""
    try:
        from flashvaed_cli.cli.streams import prepare_streams
        from flashvaed_cli.cli.threads import available_cores, prepare_threads

        prepare_streams()
        command = next(iter(sys.argv[1:]), "")
        prepare_threads(os.environ, available_cores(), command=command, machine_cores=os.cpu_count())
        from flashvaed_cli.cli.app import main as run_program

        run_program()
    except KeyboardInterrupt:  # while the program itself loads; commands handle their own
        print("Error: interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
