"""Python that starts in a moment: every program is a fork of a process that has the packages.

python warm_python.py serve SOCKET        imports them, says "ready", and waits for programs
python warm_python.py SOCKET PROGRAM ...  does what `python PROGRAM ...` does, in a fork
"""

import contextlib
import json
import os
import signal
import socket
import sys

PACKAGES = ["papermill", "ipykernel.kernelapp", "torch", "pandas", "scipy.stats", "torchmetrics"]
PACKAGES += ["torch._dynamo"]  # a second and a half, for the first optimizer of a program


def serve(path):
    """Wait for programs; returns in the process of each, with the words that called it."""
    for package in PACKAGES:
        importlib.import_module(package)
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, all the pages they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return keep(connection)
            connection.close()


def keep(connection):
    """Start a program, pass signals on to it, tell how it ended; returns in the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    content, files, _, _ = socket.recv_fds(connection, 1 << 20, maxfds=3)
    while not content.endswith(b"\n"):
        content += connection.recv(1 << 20)
    request = json.loads(content)
    program = os.fork()
    if program == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["words"]
    for file in files:  # a pipe ends with the program
        os.close(file)
    threading.Thread(target=pass_on_signals, args=(connection, program), daemon=True).start()
    _, status = os.waitpid(program, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def pass_on_signals(connection, program):
    """A byte is a signal; where nobody waits for the program any more, it is killed."""
    with contextlib.suppress(OSError):
        while number := connection.recv(1):
            os.kill(program, number[0])
        os.kill(program, signal.SIGKILL)


def become(words):
    """Run the program as `__main__`, to the end of this process."""
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(words[0]))
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def ask(path, words):
    """Have a program run with the files, the folder and the environment of this process."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        code = int(connection.recv(16))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        import gc  # these cost the short process more than all it does
        import importlib
        import runpy
        import threading

        become(serve(sys.argv[2]))
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
