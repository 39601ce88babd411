"""The report: one self-contained HTML page from the numbers in results.json."""
