"""Two audits compared: `build.compare_sides` makes the document, `write.write_comparison` its files.

The statistics are in `safer_engine.science.comparison`; pairs are matched as the gate matches them (`safer_engine.gate.paired`).
"""
