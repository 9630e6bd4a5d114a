"""Many runs: their file, their processes, and which of them are still to do."""
