"""The faults that others' data and machines have, again and again, by a seed; `python -m benchmarks.campaign`."""
