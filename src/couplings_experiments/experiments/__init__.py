"""One file per experiment. A file that defines ``EXPERIMENT`` is found by itself; names beginning with _ are not."""
