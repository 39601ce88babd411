"""Experiments with couplings: data, training, reports and the command line. Uses only the public API of couplings."""
