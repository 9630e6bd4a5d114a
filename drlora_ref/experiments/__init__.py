"""What it takes to run the paper's tables: tasks, models and records.

The method itself is the files one folder up, and nothing there imports this folder.
"""
