"""What a GPU says of this project in ten minutes: `python -m benchmarks.gpu` runs stages in order of worth.

Each stage is a module with a function ``run``, and runs in a process group of its own: see `plan`. What it finds it
appends to one file of JSON lines at once (`records`); what needs CUDA's own interfaces goes through `device`, whose
rehearsal does the same on a CPU; what reaches into the kernels is in `internals`.
"""
