"""Start `dcris` many times without importing torch each time, by forking a process that has
imported it.

That process is this file, run as a program. A request is a line of JSON: {"start": [words],
"output": file, "errors": file, "first": code, "env": {}} is answered with the new process's id,
{"poll": id} with its exit code or null. Each start has a session of its own, and can be killed like
any other process.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


def torchrun_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for one of several processes on this
    machine.

    `port` is that of a store that the test holds, as torchrun does:
    `torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)`. A port
    that is merely free may be taken before rank 0 uses it; in the range of outgoing connections, a
    process that connects too early can even connect to itself.
    """
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    theirs = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in (own | theirs | {"TORCHELASTIC_RESTART_COUNT": 0}).items()}


class Launcher:
    """The client, for tests. A context."""

    def __enter__(self) -> "Launcher":
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._ask({"poll": 0}) is None  # it has imported everything
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait(30)

    def start(
        self, words: Iterable[object], output: Path, *, errors: Path | None = None, first: str = "", **env: object
    ) -> int:
        """Start `dcris words...` in a session of its own.

        Args:
            words: the command line.
            output: what the process prints is appended to this file.
            errors: the same for what it prints as errors; None for `output`.
            first: Python code that is run before the command.
            env: environment variables.

        Returns:
            The id of the process.
        """
        values = {name: str(value) for name, value in env.items()}
        files = {"output": str(output), "errors": str(errors or output)}
        return self._ask({"start": [str(word) for word in words], **files, "first": first, "env": values})

    def run_code(self, code: str, output: Path) -> str:
        """Run Python code in a process of its own; return what it printed into the file `output`.

        The test fails if the code raises.
        """
        process = self.start((), output, first=f"{code}\nraise SystemExit(0)")
        assert self.wait(process) == 0, output.read_text()
        return output.read_text()

    def poll(self, process: int) -> int | None:
        """Return the exit code once, negative for a signal; None while the process runs."""
        return self._ask({"poll": process})

    def wait(self, process: int, seconds: float = 120) -> int:
        """Return the exit code; a process that takes longer is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        while (code := self.poll(process)) is None:
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
                raise AssertionError(f"process {process} still ran after {seconds} s")
            time.sleep(0.02)
        return code

    def _ask(self, request: dict[str, Any]) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


def _serve() -> None:
    import torch._dynamo  # noqa: F401  (training does, which takes a second)
    from PIL import Image

    from dcris.cli import main
    from dcris.data.readers import load as references  # noqa: F401
    from dcris.inference import batch  # noqa: F401
    from dcris.training import trainer  # noqa: F401
    from dcris.utils import distributed  # noqa: F401

    Image.init()
    gc.freeze()  # or a collection in a new process would copy all memory
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = os.fork()
            if child == 0:
                _become(request, main)
            answer = child
        elif request["poll"] == 0:
            answer = None
        else:
            done, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        print(json.dumps(answer), flush=True)


def _become(request: dict[str, Any], main: Callable[[list[str]], int]) -> NoReturn:
    """Run a request in this process and exit as a program does, except that the memory is left to
    the system to free, which is faster."""
    os.setsid()
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    code: Any = 1
    try:
        exec(request["first"], {})
        code = main(request["start"])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    _serve()
