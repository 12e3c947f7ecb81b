"""What each stage will take, before it is run: memory and time by formula, from rates known or measured."""

from gif.planning.command import plan
from gif.planning.rates import CARDS, Rates, measure_rates
from gif.planning.stages import StageCost, spread_memory, spread_step_seconds

__all__ = ["CARDS", "Rates", "StageCost", "measure_rates", "plan", "spread_memory", "spread_step_seconds"]
