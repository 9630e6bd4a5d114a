"""What pytest leaves alone: the pages that assemble.py writes, copies of solutions among them."""

collect_ignore = ["_source", "_build"]
