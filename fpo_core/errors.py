"""The one exception for what a user can mend: bad recipes, data, models, settings.

A message says what was given, what is allowed and what to do. The command line prints it
without a traceback; everything else that is raised is a fault of ours.
"""


class FPOError(Exception):
    """A mistake in the user's input or surroundings, told in words he can act on."""


class UsageError(FPOError):
    """A command or parameter that makes no sense as given: nothing ran."""


class RecipeError(UsageError):
    """A recipe or override that cannot be read."""


class Preempted(FPOError):
    """Training was told to stop, saved itself and left; the same command goes on."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread: what runs saves itself, as after Ctrl-C."""
