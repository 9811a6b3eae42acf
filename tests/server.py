"""Runs scripts in forks of one process that has imported the libraries: importing torch takes seconds, a fork none.

    python tests/server.py LIBRARY...

Reads one request a line, {"arguments", "cwd", "environment", "stdout", "stderr"} as JSON, runs `python ARGUMENTS` with
its output in these two files, and answers with two lines: the process id at its start, the exit code at its end.
"""

import importlib
import json
import os
import runpy
import sys


def next_script() -> list[str]:
    """Serve until a fork is to become a script: returns, in the fork, what `python` would be called with."""
    for line in sys.stdin:
        request = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(request[stream], os.O_WRONLY), number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["arguments"]
    sys.exit()


for name in sys.argv[1:]:
    importlib.import_module(name)
sys.argv = next_script()
sys.path[0] = os.getcwd()
if sys.argv[0] == "-c":
    exec(sys.argv.pop(1), {"__name__": "__main__"})
elif sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
