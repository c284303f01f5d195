"""The program: `flannelpy [flags]` is the daemon, `flannelpy COMMAND ...` one of the commands."""

import os
import sys

from flannelpy.errors import FlannelpyError, SettingsError


def main() -> int:
    """Run what the command line says and return the exit code; a user's error is one line on stderr."""
    try:
        return _run(sys.argv[1:])
    except FlannelpyError as error:
        print(f"flannelpy: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has left; without this the interpreter complains about it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    if argv and argv[0] and not argv[0].startswith("-"):
        return _command(argv[0], argv[1:])

    from flannelpy import settings

    parsed = settings.parse(argv, os.environ)
    if isinstance(parsed, settings.ShowHelp):
        print(settings.help_text(), end="", flush=True)
        return 0
    if isinstance(parsed, settings.ShowVersion):
        from flannelpy import __version__

        print(f"flannelpy {__version__}", flush=True)
        return 0

    from flannelpy.daemon import run

    return run(parsed)


def _command(name: str, argv: list[str]) -> int:
    import importlib

    from flannelpy.usage import COMMANDS

    if name not in COMMANDS:
        import difflib

        found = difflib.get_close_matches(name[:64], [*COMMANDS, "--help", "--version"], n=1, cutoff=0.4)
        hint = f"did you mean {found[0]}?" if found else "commands are " + ", ".join(COMMANDS)
        raise SettingsError(f"{name[:64]!r} is not a command: {hint} (flags of the daemon begin with --)")
    module = importlib.import_module("flannelpy.cli." + name.replace("-", "_"))
    code: int = module.main(argv)
    return code


if __name__ == "__main__":
    sys.exit(main())
