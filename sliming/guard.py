"""What keeps a program whole: files that are files, one process at a time, one line at the end.

Every error that a user sees goes through `one_line`; every file that a stranger may hand over is
opened by `open_file`; every file that a program goes on with is held by `only_one`.
"""

import errno
import gc
import importlib
import logging
import os
import re
import shlex
import signal
import stat
import sys
import threading
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import sliming

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two programs apart
    fcntl = None


class InputError(ValueError):
    """Something handed over that cannot be used; the message is one line of plain text."""

    def __init__(self, message: str):
        super().__init__(short(plain(message)))


class Stopped(Exception):
    """The program was asked to end, and has kept what it did."""


def plain(text: str) -> str:
    """The text as a terminal may show it: line breaks, escape sequences, what turns the direction
    of writing and half characters appear as escapes, \\x1b."""
    return "".join(letter if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
                   else letter.encode("unicode_escape").decode() for letter in text)


def short(text: str) -> str:
    """A long text without its middle."""
    return text if len(text) <= 700 else f"{text[:400]} ... {text[-250:]}"


# -------------------------------------------------------------------------------------------- files


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file, to be read. OSError for anything else: a pipe would be waited for, a device
    read without end."""
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_text(path: str | os.PathLike) -> str:
    """A regular file as UTF-8 text, without a byte-order mark. OSError, UnicodeDecodeError."""
    with open_file(path) as file:
        return file.read().decode("utf-8-sig")


def checksum(path: Path) -> int:
    """Of a file's bytes, which are on the disk itself then."""
    total = 0
    with open_file(path) as file:
        while piece := file.read(1 << 24):
            total = zlib.crc32(piece, total)
        os.fsync(file.fileno())
    return total


def ends(path: str | os.PathLike, most: int) -> bytes:
    """A file's first and last `most` bytes. OSError."""
    with open_file(path) as file:
        first = file.read(most)
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return first + file.read()


def fingerprint(path: str | os.PathLike) -> str:
    """What tells a file from what was there before, or will be: its size, time of change, first
    and last bytes, in words. OSError."""
    found, crc = os.stat(path), zlib.crc32(ends(path, 1 << 16))
    time = datetime.fromtimestamp(found.st_mtime).isoformat(" ")
    return f"{found.st_size:,} bytes of {time} ({crc:08x})"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that comes without a name, as that of a full disk does, gets this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Keeps a second process from writing a folder, by .lock in it, or a file, by FILE.lock beside
    it; the lock of a process that was killed is void. InputError that names the other one."""
    if not fcntl:
        yield
        return
    path = out / ".lock" if out.is_dir() else out.with_name(out.name + ".lock")
    with open(path, "a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder removes its lock; one that was opened just before is nobody's.
            free = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except OSError:
            free = False
        if not free:
            lock.seek(0)
            raise InputError(f"{out}: process {lock.read().strip()} is writing it; wait for it, "
                             "or give another --out")
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """One process at a time, by a lock file: who comes later waits."""
    with open(path, "w") as lock:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------- ending


@contextmanager
def one_line(program: str, resumes: bool = False) -> Iterator[None]:
    """Around (or, as a decorator, on) a program's `main`: whatever is wrong with what it was given
    ends it with one line, and so does Ctrl-C; with what to type to go on, where it `resumes`."""
    def stopped(message: str) -> None:
        if os.environ.get("RANK", "0") != "0":  # all ranks stop, one says so
            sys.exit(128 + signal.SIGINT)
        message += f"; to go on: {same_command()}" if resumes else ""
        end(program, message, 128 + signal.SIGINT)

    def interrupted(number: int, frame: FrameType | None) -> None:
        while frame:
            if "importlib" in frame.f_code.co_filename:  # some modules make other errors of it
                try:
                    stopped("stopped")
                finally:
                    os._exit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    heard = before in (signal.SIG_DFL, signal.default_int_handler)
    if heard:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        stopped(str(stop) or "stopped")
    except (ValueError, OSError, ArithmeticError) as error:
        end(program, str(error) or type(error).__name__, 1)
    except RuntimeError as error:
        if not (known := of_the_machine(error)):
            raise
        end(program, known, 1)
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)


def program(module: str) -> None:
    """Runs the `main` of a module, whose import may be interrupted, too."""
    with one_line(module.rpartition(".")[0]):
        importlib.import_module(module).main()


def deaf(worker: int = 0) -> None:
    """For a process that works for another one: Ctrl-C, and SIGTERM to all of a job's processes,
    are that one's to answer, and the worker ends when its parent says so."""
    def obey(parent: int = os.getppid()) -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)  # asked to, and no failure

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=obey, daemon=True).start()


def same_command() -> str:
    """What to type to go on with what was interrupted."""
    start = "torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{start} {re.sub(' --resume[= ]never', '', shlex.join(sys.argv))}"


def end(program: str, message: str, code: int) -> None:
    """Prints the one line and ends the program."""
    gc.unfreeze()  # what was set aside is taken down, too: triton would list what is left
    rank = os.environ.get("RANK", "0")
    message = short(plain(" ".join(message.split())))
    if not first_to_say(message):
        sys.exit(code)
    message = f"{program}: {'' if rank == '0' else f'rank {rank}: '}{message}"
    if code == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def first_to_say(message: str) -> bool:
    """False where another of torchrun's ranks on this machine has said so: most fail alike."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/RANK/error.json
    try:
        if place:
            said = Path(place).parents[1] / f"said-{zlib.crc32(message.encode()):08x}"
            said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def in_torchrun() -> None:
    """What torchrun loads of this package (pyproject.toml: torchrun.handlers). Where it starts our
    train.py, the ranks share the cores, of which torchrun would give each one, with a banner about
    it; and nothing follows the line in which it logs that a rank has failed: it would add forty.
    """
    ours = Path(__file__).resolve().parents[1] / "train.py"
    if ours not in [Path(word).resolve() for word in sys.argv[1:]]:
        return
    if ranks := re.search(r"--nproc[-_]per[-_]node[= ](\d+)( |$)", " ".join(sys.argv[1:])):
        sliming.share_cores(int(ranks[1]))

    def hook(kind: type, *error: object, usual=sys.excepthook) -> None:
        if kind.__name__ not in ("ChildFailedError", "SignalException", "KeyboardInterrupt"):
            usual(kind, *error)

    sys.excepthook = hook
    for module in ("multiprocessing.api", "agent.server.api"):  # a line for each rank that it ends
        logger = logging.getLogger(f"torch.distributed.elastic.{module}")
        logger.addFilter(lambda record: record.levelno > logging.WARNING)


def of_the_machine(error: RuntimeError) -> str:
    """What to say of an error that is the machine's, not this package's; "" for all others."""
    text = str(error).partition("\n")[0]
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.partition('. ')[0]}: lower the batch, or the tokens of a micro-batch"
    if type(error).__name__.startswith("Dist") or "gloo" in text or "Connection " in text:
        return "lost touch with another rank, which has ended; its own line or torchrun's says why"
    return ""


class Signals:
    """From now on SIGTERM (a scheduler's) and the first Ctrl-C are kept in mind, in `came`, until
    a step is done; the second one counts at once. `end` gives them back."""

    def __init__(self):
        self.came, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.keep)
                           for number in (signal.SIGTERM, signal.SIGINT)}

    def keep(self, number: int, frame: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True

    def end(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
