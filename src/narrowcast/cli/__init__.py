"""The command line: words and options in, records out; no arithmetic."""
