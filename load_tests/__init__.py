"""Black-box load tests: `python -m load_tests.NAME --json [--save]`. They see what a user sees: HTTP, the command, the log."""
