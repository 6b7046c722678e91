"""The engine of evaluations: suites, units of work, the journal, figures with intervals, result files."""
