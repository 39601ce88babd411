"""The report: a site of self-contained HTML pages from the numbers in results.json, and the comparison of two."""
