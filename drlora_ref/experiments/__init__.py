"""What it takes to run the paper's tables. The method itself is the files one folder up.

The rooms, in reading order. Each imports only from rooms above it in this list:

    given.py     what a person wrote: YAML, words, names that are nearly right
    sources/     where models come from, and the words of the generated data
    tasks/       data, evaluation and metrics; a module for each family of tasks
    methods/     what each method does to a model before training
    run/         one run: its settings, the loop, checkpoints, the record
    replicas/    many runs in one pass over one frozen encoder
    results/     records into tables, beside the paper's figures
    grids/       many runs from one file, each done once, here or on Slurm
    gpu/         all of it on a GPU, in the time there is: a check, a benchmark, a queue of grids
    __main__.py  the command line

To follow a single run, read run/settings.py (its parameters), run/one_run.py (look everything up,
train, write the record) and run/loop.py (what is due after which step).

    to add        open                      and see
    a method      methods/__init__.py       METHODS: a function and an entry
    a task        tasks/families.py         FAMILIES: a row of TASKS in one of them, or a new module
    a score       ../importance.py          SCORES: a function and an entry
    a base model  ../inject.py              BASE_MODELS: an entry

CONTRIBUTING.md has each of these in steps, with the test that guards it.
"""
