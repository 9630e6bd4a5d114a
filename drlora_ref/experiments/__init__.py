"""What it takes to run the paper's tables: tasks, models, methods, runs, grids, records.

The method itself is the files one folder up, and nothing there imports this folder. To read it,
follow a run: settings (its parameters), runs (look everything up, train, write the record), loop
(the steps) and checkpoints. Around it, what a run is made of: data, with a module for each family
of tasks (tasks for GLUE, squad, xsum, commonsense); models; methods. Above it, many runs: plans,
grid and jobs. After it: results, report and paper, the figures to compare with.
"""
