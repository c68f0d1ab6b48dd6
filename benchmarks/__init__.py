"""One runnable module per question; results are kept in docs/benchmarks.md."""
