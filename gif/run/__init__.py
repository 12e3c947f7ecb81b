"""`gif run`: from a data set to a judged model and a report, every choice made from the data and said."""

from gif.run.command import RunConfig, run, run_command

__all__ = ["RunConfig", "run", "run_command"]
