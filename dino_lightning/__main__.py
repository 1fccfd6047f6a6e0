"""The command ``dino-lightning``."""

import sys
from collections.abc import Sequence

from dino_lightning.door import errors
from dino_lightning.door.entrance import enter


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command. Errors of the user end it with a few lines and exit code 2 (wrong arguments) or 1; ``--debug`` raises them."""
    args = sys.argv[1:] if args is None else list(args)
    call = None
    try:
        call = enter([arg for arg in args if arg != "--debug"])
        if call:
            from dino_lightning import cli  # torch and Lightning: seconds

            cli.run(call)
    except Exception as error:
        if "--debug" in args or not errors.of_the_user(error):
            raise
        wrong_arguments = call is None or isinstance(error, errors.UsageError)
        errors.tell(error, hint="" if wrong_arguments else "(--debug shows where)")
        sys.exit(2 if wrong_arguments else 1)


if __name__ == "__main__":
    main()
