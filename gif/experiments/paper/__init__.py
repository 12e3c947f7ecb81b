"""`gif experiments`: the experiments of the paper's supplement, each one command, a module a section."""
